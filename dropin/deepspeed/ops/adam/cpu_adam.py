"""deepspeed.ops.adam.cpu_adam."""

from craken.optim.deepspeed_names import DeepSpeedCPUAdam as DeepSpeedCPUAdam
