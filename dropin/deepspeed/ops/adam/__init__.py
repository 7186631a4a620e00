"""deepspeed.ops.adam."""

from craken.optim.deepspeed_names import DeepSpeedCPUAdam as DeepSpeedCPUAdam
from craken.optim.deepspeed_names import FusedAdam as FusedAdam
