"""Mesh axes: one dimension of the grid of ranks, with the process group that spans it.

An axis can be split in two, for links that differ in speed (ranks of a node, and nodes):

    dp          0 1 2 3 4 5 6 7
    dp.inner    0 1 2 3 | 4 5 6 7           consecutive ranks
    dp.outer    0 4 | 1 5 | 2 6 | 3 7       one rank of each inner axis; dp rank = outer rank x inner size + inner rank
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch.distributed as dist

from craken.comm.accelerator import get_accelerator

# groups live as long as the process group they are parts of: one split serves every engine that asks for it
_splits: WeakKeyDictionary[dist.ProcessGroup, dict[int, tuple[MeshAxis, MeshAxis]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class MeshAxis:
    """A named set of ranks that communicate; `rank` and `size` count within the axis.

    `group` is None for an axis of one rank without a process group (nothing is ever sent over it).
    """

    name: str
    group: dist.ProcessGroup | None
    rank: int
    size: int

    def global_rank(self, axis_rank: int) -> int:
        """Return the job-wide rank of the axis's `axis_rank`-th member."""
        return axis_rank if self.group is None else dist.get_global_rank(self.group, axis_rank)

    @cached_property
    def backend(self) -> str:
        """The backend that serves this process's device: `gloo`, `nccl`, ..."""
        if self.group is None:
            return "none"
        name = str(dist.get_backend(self.group))
        if name == "undefined" or ":" in name:  # one backend a kind of device
            name = str(self.group._get_backend(get_accelerator().device()).name())
        return name


def world_axis(name: str = "dp") -> MeshAxis:
    """Return the axis over all ranks of the job; requires `init_distributed` to have run."""
    if not dist.is_initialized():
        raise RuntimeError("no process group yet: call init_distributed() (or initialize()) before asking for an axis")
    return axis_over(dist.group.WORLD, name)


def axis_over(group: dist.ProcessGroup | None, name: str = "dp") -> MeshAxis:
    """Return the axis that spans `group` (None: the default group)."""
    group = group or dist.group.WORLD
    return MeshAxis(name, group, dist.get_rank(group), dist.get_world_size(group))


def split_axis(axis: MeshAxis, inner_size: int) -> tuple[MeshAxis, MeshAxis]:
    """Collective over all ranks of the job: return `axis` as (inner, outer), inner of `inner_size` consecutive ranks.

    ValueError, on all ranks, unless `inner_size` divides the size of the axis. The new groups end with the job's.
    """
    if inner_size < 1 or axis.size % inner_size:
        raise ValueError(
            f"expected a size that divides the {axis.size} ranks of {axis.name}, got {inner_size}: choose one of "
            f"{[size for size in range(1, axis.size + 1) if axis.size % size == 0]}"
        )
    if axis.group is None:
        return _alone(f"{axis.name}.inner"), _alone(f"{axis.name}.outer")
    known = _splits.setdefault(axis.group, {})
    if inner_size not in known:
        known[inner_size] = _split(axis, axis.group, inner_size)
    return known[inner_size]


def _split(axis: MeshAxis, group: dist.ProcessGroup, inner_size: int) -> tuple[MeshAxis, MeshAxis]:
    ranks = dist.get_process_group_ranks(group)
    inners = [ranks[first : first + inner_size] for first in range(0, axis.size, inner_size)]
    outers = [ranks[first::inner_size] for first in range(inner_size)]
    return _axis_among(inners, f"{axis.name}.inner", axis), _axis_among(outers, f"{axis.name}.outer", axis)


def _axis_among(members: list[list[int]], name: str, whole: MeshAxis) -> MeshAxis:
    """Return the one of several axes that this rank is on; groups are made for all, in one order on all ranks."""
    if len(members) == 1:
        return MeshAxis(name, whole.group, whole.rank, whole.size)
    if len(members[0]) == 1:
        return _alone(name)
    groups = [dist.new_group(ranks) for ranks in members]
    mine = next(index for index, ranks in enumerate(members) if dist.get_rank() in ranks)
    return axis_over(groups[mine], name)


def _alone(name: str) -> MeshAxis:
    return MeshAxis(name, None, 0, 1)
