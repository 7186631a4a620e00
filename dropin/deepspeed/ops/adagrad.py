"""deepspeed.ops.adagrad."""

from craken.optim.deepspeed_names import DeepSpeedCPUAdagrad as DeepSpeedCPUAdagrad
