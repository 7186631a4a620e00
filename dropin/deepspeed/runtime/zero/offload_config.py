"""deepspeed.runtime.zero.offload_config: the sections offload_param and offload_optimizer, and what may leave."""

from craken.config.sections.zero import OffloadOptimizer as DeepSpeedZeroOffloadOptimizerConfig
from craken.config.sections.zero import OffloadParam as DeepSpeedZeroOffloadParamConfig
from craken.zero.deepspeed_names import OffloadDeviceEnum, OffloadStateTypeEnum

__all__ = [
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "OffloadDeviceEnum",
    "OffloadStateTypeEnum",
]
