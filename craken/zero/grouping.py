"""Plans which parameters communicate together: one dtype and one kind of cut a group, within a byte budget. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from craken.zero.layout import Cut, lay_out

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
    open_groups: dict[tuple[str, Cut], list[int]] = {}
    groups: list[list[int]] = []
    for index, fact in enumerate(facts):
        kind = (fact.dtype, fact.cut)
        group = open_groups.get(kind)
        if group is None or _is_full(facts, group, fact, world_size, budget):
            group = open_groups[kind] = []
            groups.append(group)
        group.append(index)
    return groups


def _is_full(
    facts: Sequence[ParamFacts], group: Sequence[int], fact: ParamFacts, world_size: int, budget: Budget
) -> bool:
    numels = [facts[index].numel for index in group]
    numel = sum(numels) + fact.numel
    if numel <= budget.numel and numel * fact.itemsize <= budget.num_bytes:
        return False
    if fact.cut is Cut.PACKED:
        return True
    return lay_out(numels, world_size, fact.cut).padded_numel <= (1 + _MAX_WASTE) * sum(numels) + 32 * world_size
