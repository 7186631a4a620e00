"""Plans which parameters communicate together: one dtype and one kind of cut a group, within a byte budget. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from craken.zero.plans.layout import Cut, lay_out

# A group's buffer. On CPU 4 MiB measured best (benchmarks/train_step.py): most large weights then are alone in a group,
# whose gradient travels from autograd's own tensor. On CUDA launches cost more and bandwidth needs larger messages.
CPU_GROUP_BYTES = 4 << 20
CUDA_GROUP_BYTES = 128 << 20
_MAX_WASTE = 0.02  # of a group, as padding, before more whole parameters are added to balance it


@dataclass(frozen=True)
class ParamFacts:
    """What planning needs to know of a parameter: `dtype` by name, size in elements and bytes an element."""

    fqn: str
    numel: int
    dtype: str
    itemsize: int
    cut: Cut


@dataclass(frozen=True)
class Budget:
    """How large a group may be: bytes of its buffer, and elements (a config's bucket size)."""

    num_bytes: int
    numel: int

    def __post_init__(self) -> None:
        if self.num_bytes <= 0 or self.numel <= 0:
            raise ValueError(f"a shard group's budget must be positive, got {self}")


def plan_groups(facts: Sequence[ParamFacts], *, world_size: int, budget: Budget) -> list[list[int]]:
    """Return groups as lists of indices into `facts`, in order of first parameter.

    Neighbours of one kind share a group until it exceeds the budget; a larger parameter has its own group. Groups that
    are cut between parameters only grow past the budget while padding would waste more than 2 %.
    """
    open_groups: dict[tuple[str, Cut], _Draft] = {}
    drafts: list[_Draft] = []
    for index, fact in enumerate(facts):
        kind = (fact.dtype, fact.cut)
        draft = open_groups.get(kind)
        if draft is None or draft.is_full(fact, world_size, budget):
            draft = open_groups[kind] = _Draft()
            drafts.append(draft)
        draft.add(index, fact)
    return [draft.indices for draft in drafts]


class _Draft:
    """A group that may still grow."""

    def __init__(self) -> None:
        self.indices: list[int] = []
        self._numels: list[int] = []
        self._numel = 0

    def add(self, index: int, fact: ParamFacts) -> None:
        self.indices.append(index)
        self._numels.append(fact.numel)
        self._numel += fact.numel

    def is_full(self, fact: ParamFacts, world_size: int, budget: Budget) -> bool:
        """Say whether `fact` does not belong here any more."""
        numel = self._numel + fact.numel
        if numel <= budget.numel and numel * fact.itemsize <= budget.num_bytes:
            return False
        if fact.cut is Cut.PACKED:
            return True
        padded = lay_out(self._numels, world_size, fact.cut).padded_numel
        return padded <= (1 + _MAX_WASTE) * self._numel + 32 * world_size
