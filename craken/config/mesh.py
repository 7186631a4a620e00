"""Checks sizes that must divide the number of data-parallel ranks: how far shards spread, and second copies."""

from __future__ import annotations

from craken.config.sections.zero import PARAMETERS_SHARDED, ZeroOptimization

_KEYS = ("mics_shard_size", "zero_hpz_partition_size")


def check_mesh(zero: ZeroOptimization, num_ranks: int) -> None:
    """ValueError for the first size that does not divide `num_ranks`, where it has an effect."""
    for key in _KEYS if zero.stage == PARAMETERS_SHARDED else ():
        size = getattr(zero, key)
        if size > 0 and num_ranks % size:
            sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
            raise ValueError(
                f"zero_optimization.{key} is {size}, which does not divide the {num_ranks} data-parallel ranks: choose "
                f"one of {', '.join(map(str, sizes))}, or start another number of ranks"
            )
