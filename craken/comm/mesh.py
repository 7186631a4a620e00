"""Mesh axes: one dimension of the grid of ranks, with the process group that spans it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from craken.comm.accelerator import get_accelerator


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
