"""deepspeed.zero: weights that are kept as shards."""

from craken import GatheredParameters as GatheredParameters
