"""deepspeed.runtime.config: the parsed config; what is wrong with one is a ValueError."""

from builtins import ValueError as DeepSpeedConfigError

from craken.config import load_config as DeepSpeedConfig

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError"]
