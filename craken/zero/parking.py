"""Gives the device's memory up for a while: states wait on the host and come back to the same addresses' tensors.

For whoever needs the device between two steps (generation, another model). Storages shrink to nothing and grow again,
so views of them (fragments, parameters) are right when the bytes are back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from craken.zero.binding import Binding
from craken.zero.group import ShardGroup
from craken.zero.memory.link import Link
from craken.zero.state import tensor_states

OPTIMIZER_STATES, MASTERS, WEIGHTS, GRADIENTS = "optim_states", "hp_params", "lp_params", "lp_grads"
KINDS = (OPTIMIZER_STATES, MASTERS, WEIGHTS, GRADIENTS)


class Parked(NamedTuple):
    """A storage that has given its memory up, and its bytes."""

    storage: torch.UntypedStorage
    values: Tensor  # uint8 [bytes of the storage]


class Parking:
    """What has left the device for a while."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._parked: list[Parked] = []

    def take(self, tensors: Iterable[Tensor], *, pins: bool) -> None:
        """Copy the storages of those `tensors` that are on the device to the host, and let their device memory go."""
        parked: dict[int, Parked] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device != self._link.device or storage.nbytes() == 0 or storage.data_ptr() in parked:
                continue
            values = self._link.empty(storage.nbytes(), torch.uint8, pins=pins)
            values.copy_(_bytes_of(storage), non_blocking=True)
            parked[storage.data_ptr()] = Parked(storage, values)
        self._link.mark().wait_on_host()
        for one in parked.values():
            one.storage.resize_(0)
        self._parked += parked.values()

    def bring_back(self) -> None:
        """Undo every `take`."""
        for storage, values in self._parked:
            storage.resize_(values.numel())
            _bytes_of(storage).copy_(values, non_blocking=True)
        self._link.mark().wait_on_host()
        self._parked = []

    def check_empty(self, what: str) -> None:
        """RuntimeError if anything is away that `what` needs."""
        if self._parked:
            raise RuntimeError(f"{what} while states are offloaded by offload_states(): call reload_states() first")


def states_of_kinds(
    groups: Sequence[ShardGroup], frozen: Sequence[ShardGroup], binding: Binding | None, kinds: Sequence[str]
) -> Iterator[Tensor]:
    """Yield what a rank holds of these kinds (see KINDS) between two steps."""
    for index, group in enumerate((*groups, *frozen)):
        if OPTIMIZER_STATES in kinds and binding is not None and index < len(groups):
            for fragment in binding.fragments(index):
                yield from (state for _, state in tensor_states(binding, fragment))
        if MASTERS in kinds and not group.master_is_kept:
            yield group.master
        if WEIGHTS in kinds:
            yield from [group.full] if group.weights is None else [group.kept, *group.weights.nearby]
        if GRADIENTS in kinds:
            yield from group.gradients.on_device


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
