"""Weights that are kept as shards, as their users see them: `GatheredParameters`, and the attributes clients read.

Names and meanings are DeepSpeed's (`ds_id`, `ds_shape`, `ds_numel`, `ds_status`, `ds_active_sub_modules`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from craken.comm import broadcast
from craken.zero.group import ShardGroup
from craken.zero.lifecycle import Lifecycle
from craken.zero.weights import ZeroParamStatus, set_status


class _Place(NamedTuple):
    """Where a parameter's values are. `lifecycle` is None where they are always whole; groups are numbered in order."""

    group: ShardGroup
    number: int
    lifecycle: Lifecycle | None


_ATTRIBUTES = ("ds_id", "ds_shape", "ds_numel", "ds_active_sub_modules", "ds_status")

_places: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> _Place
_group_numbers, _param_numbers = itertools.count(), itertools.count()


def register(groups: Sequence[ShardGroup], lifecycle: Lifecycle) -> None:
    """Make the parameters of an engine's groups known here, and give them the attributes that clients read."""
    for group in groups:
        place = _Place(group, next(_group_numbers), None if group.weights is None else lifecycle)
        for param, shape in zip(group.params, group.shapes, strict=True):
            _places[param] = place
            facts = {"ds_id": next(_param_numbers), "ds_shape": torch.Size(shape), "ds_numel": math.prod(shape)}
            for name, value in {**facts, "ds_active_sub_modules": set()}.items():
                setattr(param, name, value)
            if group.weights is None:
                set_status(param, ZeroParamStatus.AVAILABLE)


class GatheredParameters:
    """Have parameters whole inside the block. Collective over all ranks at its beginning, with a modifier at its end.

    params: a parameter or any iterable of them; None, buffers, ordinary parameters and duplicates are passed over, and
    so are those that an outer block has gathered. modifier_rank: the rank whose edits (in place, `.data = ...`) become
    everybody's; None discards edits. fwd_module: the module whose forward uses them here, for which they are gathered
    again in backward. The order of `params` may differ between ranks.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor | None],
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        listed = [params] if isinstance(params, Tensor) else list(params)
        found = {place.number: place for param in listed if (place := _place_of(param)) is not None}
        self._asked = [found[number] for number in sorted(found)] if enabled else []
        self._modifier, self._is_read_by_forward = modifier_rank, fwd_module is not None
        self._mine: list[_Place] = []

    def __enter__(self) -> None:
        self._mine = [place for place in self._asked if place.lifecycle is None or not _is_pinned(place)]
        for place in self._mine:
            if place.lifecycle is None:
                continue
            place.lifecycle.residence.pin(place.group, self)
            if self._is_read_by_forward and place.lifecycle.is_running():
                place.lifecycle.read_in_forward(place.group)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        for place in self._mine:
            if self._modifier is not None and kind is None:
                _publish(place.group, self._modifier)
            if place.lifecycle is not None:
                place.lifecycle.residence.unpin(place.group, self)
        self._mine = []


def take_out(params: Sequence[nn.Parameter]) -> None:
    """Collective: give parameters that another engine keeps as shards whole tensors of their own again.

    That engine's hooks leave the model: its weights are somebody else's from now on.
    """
    places = [place for param in params if (place := _place_of(param)) is not None]
    with GatheredParameters(params):
        for param in params:
            place = _place_of(param)
            if place is None:
                continue
            if place.group.weights is not None:
                param.data = param.data.clone()
                place.group.weights.forget(param)
            del _places[param]
            for name in _ATTRIBUTES:
                delattr(param, name)
    for place in places:
        if place.lifecycle is not None:
            place.lifecycle.retire()


def _publish(group: ShardGroup, source: int) -> None:
    """Collective: make rank `source`'s values of a whole group everybody's, masters included."""
    group.collect_values()
    broadcast(group.full, group.wire.axis, label=f"{group.label} (edited)", source=source)
    group.take_from_params()


def _place_of(param: Any) -> _Place | None:
    if not isinstance(param, nn.Parameter) or param not in _places:
        return None
    place: _Place = _places[param]
    return place


def _is_pinned(place: _Place) -> bool:
    assert place.lifecycle is not None
    return place.lifecycle.residence.is_pinned(place.group)
