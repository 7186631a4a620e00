"""deepspeed.runtime.engine."""

from craken import DeepSpeedEngine as DeepSpeedEngine
