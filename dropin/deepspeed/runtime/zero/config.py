"""deepspeed.runtime.zero.config: the section zero_optimization."""

from craken.config import ZeroOptimization as DeepSpeedZeroConfig
from craken.zero.deepspeed_names import ZeroStageEnum

__all__ = ["DeepSpeedZeroConfig", "ZeroStageEnum"]
