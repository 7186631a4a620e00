"""Where what a rank keeps of a group rests between uses: on the device, in the host's memory, or in files.

    weights   the shard of the weights in the compute dtype (with params SHARD)      device | host | disk
    states    the master, the optimizer's states, and on their way the gradients     device | host | disk

Gradients of states that rest on a disk wait for the step in the host's memory. Where host and device are one memory,
resting on the host is resting on the device: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum


class Place(Enum):
    """A memory, nearest to the computation first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "nvme"


@dataclass(frozen=True)
class Placement:
    """Where a group's shards rest, and whether host memory that the device reads and writes is page-locked."""

    weights: Place = Place.DEVICE
    states: Place = Place.DEVICE
    pins_weights: bool = True
    pins_states: bool = True

    def resolve(self, *, host_is_device: bool) -> Placement:
        """Return the placement with one name for what is one memory."""
        if not host_is_device:
            return self
        weights, states = (Place.DEVICE if place is Place.HOST else place for place in (self.weights, self.states))
        return replace(self, weights=weights, states=states)


ON_DEVICE = Placement()


def share_of_host(numels: Sequence[int], ratio: float) -> list[bool]:
    """Say for each group of `numels` elements whether its states leave the device, so that about `ratio` of all do.

    The groups that stay are spread evenly: their updates run on the device while the host updates others.
    """
    seen = leaving = 0
    leaves = []
    for numel in numels:
        seen += numel
        leaves.append(leaving + numel / 2 <= ratio * seen)
        leaving += numel if leaves[-1] else 0
    return leaves
