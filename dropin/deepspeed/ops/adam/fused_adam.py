"""deepspeed.ops.adam.fused_adam."""

from craken.optim.deepspeed_names import FusedAdam as FusedAdam
