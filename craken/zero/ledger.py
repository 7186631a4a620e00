"""Counts what a rank holds of a model, by the memory it lies in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from craken.zero.binding import Binding
from craken.zero.group import ShardGroup
from craken.zero.memory.placement import Place
from craken.zero.state import tensor_states


def bytes_by_place(groups: Sequence[ShardGroup], frozen: Sequence[ShardGroup], binding: Binding | None) -> Counter[str]:
    """Return the bytes of weights, masters, optimizer states and gradients on "device", "host" and "nvme" (files)."""
    counted: Counter[str] = Counter({place.value: 0 for place in Place})
    for index, group in enumerate((*groups, *frozen)):
        for place, tensors in _held(group):
            counted[place.value] += sum(tensor.nbytes for tensor in tensors)
        if binding is not None and index < len(groups):
            states = (state for f in binding.fragments(index) for _, state in tensor_states(binding, f))
            counted[group.rules.placement.states.value] += sum(state.nbytes for state in states)
    return counted


def _held(group: ShardGroup) -> Iterable[tuple[Place, list[Tensor]]]:
    place = group.rules.placement
    if group.weights is None:
        yield Place.DEVICE, [group.full]
    else:
        yield place.weights, [group.kept]
        yield Place.DEVICE, [group.full] if group.weights.is_whole else []
        yield Place.DEVICE, group.weights.nearby
    if not group.master_is_kept:
        yield place.states, [group.master]
    yield Place.DEVICE, group.gradients.on_device
    yield Place.HOST, group.gradients.on_host
