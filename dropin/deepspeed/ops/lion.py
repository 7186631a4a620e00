"""deepspeed.ops.lion."""

from craken.optim.deepspeed_names import DeepSpeedCPULion as DeepSpeedCPULion
from craken.optim.deepspeed_names import FusedLion as FusedLion
