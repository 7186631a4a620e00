"""The ZeRO stage as a row of a table (arXiv 1910.02054): what a rank keeps, and from that alone when each verb fires.

         optimizer  grads  params        sent a step of g micro-batches, times (N-1)/N
stage 0    FULL     FULL   FULL          2 Psi      all-reduce = reduce-scatter + all-gather
stage 1    SHARD    FULL   FULL          2 Psi      reduce-scatter at the boundary, all-gather after the step
stage 2    SHARD    SHARD  FULL          (g+1) Psi  reduce-scatter in each backward, all-gather after the step
stage 3    SHARD    SHARD  SHARD         3 g Psi    all-gather in each forward and each backward, reduce-scatter in each
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Keep(Enum):
    """How much of a tensor a rank keeps between uses."""

    FULL = auto()  # every rank holds the whole tensor
    SHARD = auto()  # every rank holds 1/N of it


@dataclass(frozen=True)
class Policy:
    """One row of the table. Sharding nests: params => grads => optimizer."""

    optimizer: Keep
    grads: Keep
    params: Keep

    @property
    def reduces_every_backward(self) -> bool:
        """Gradients leave the rank in each backward; otherwise only at the boundary."""
        return self.grads is Keep.SHARD

    @property
    def gathers_grads(self) -> bool:
        """Every rank needs the whole reduced gradient, because every rank steps the whole optimizer."""
        return self.optimizer is Keep.FULL

    @property
    def gathers_params_after_step(self) -> bool:
        """The step updated only this rank's shard of parameters that are kept whole."""
        return self.optimizer is Keep.SHARD and self.params is Keep.FULL

    @property
    def frees_params(self) -> bool:
        """Parameters are whole only while a forward or backward uses them."""
        return self.params is Keep.SHARD


_STAGES = {
    0: Policy(Keep.FULL, Keep.FULL, Keep.FULL),
    1: Policy(Keep.SHARD, Keep.FULL, Keep.FULL),
    2: Policy(Keep.SHARD, Keep.SHARD, Keep.FULL),
    3: Policy(Keep.SHARD, Keep.SHARD, Keep.SHARD),
}


def policy_for_stage(stage: int) -> Policy:
    """Return the row for a ZeRO stage."""
    if stage not in _STAGES:
        raise NotImplementedError(
            f"zero_optimization.stage is {stage}; stages {sorted(_STAGES)} work so far: set one of them"
        )
    return _STAGES[stage]
