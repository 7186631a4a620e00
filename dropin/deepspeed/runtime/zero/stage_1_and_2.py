"""deepspeed.runtime.zero.stage_1_and_2: one optimizer serves every stage."""

from craken.zero import ShardedOptimizer as DeepSpeedZeroOptimizer  # noqa: F401
