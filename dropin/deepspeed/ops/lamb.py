"""deepspeed.ops.lamb."""

from craken.optim.deepspeed_names import FusedLamb as FusedLamb
