"""Where what a rank keeps of a group rests between uses: on the device, in the host's memory, or in files.

    weights   the shard of the weights in the compute dtype (with params SHARD)      device | host | disk
    states    the master, the optimizer's states, and on their way the gradients     device | host | disk

Gradients of states that rest on a disk wait for the step in the host's memory. Where host and device are one memory,
resting on the host is resting on the device: nothing is copied.
"""

from __future__ import annotations

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


class HostShare:
    """Deals groups out between the device and where states rest, so that about `ratio` of all elements leave it.

    (Twin-Flow.) Those that stay are spread evenly: the device updates them while the host updates others.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._seen = self._gone = 0

    def leaves(self, numel: int) -> bool:
        """Say whether the states of the next group, of so many elements, leave the device."""
        self._seen += numel
        leaves = self._gone + numel / 2 <= self._ratio * self._seen
        self._gone += numel if leaves else 0
        return leaves
