"""What a parameter carries at stage 3: where its values are, and the attributes that clients read.

Names and meanings of the attributes are DeepSpeed's: `ds_id`, `ds_shape`, `ds_numel`, `ds_status`,
`ds_active_sub_modules`, and of what is in a group `ds_tensor`: a view [n] of the part that this rank keeps, n from 0 to
all elements. Everything hangs on the parameter itself, so a model and its shards go together when nobody refers to them
any more; copies of a parameter carry none of it.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from craken.comm import MeshAxis, is_initialized, world_axis
from craken.zero.group import ShardGroup
from craken.zero.lifecycle import Lifecycle
from craken.zero.plans.layout import Fragment
from craken.zero.residence import Residence
from craken.zero.weights import ZeroParamStatus, set_status

_PLACE = "_craken_place"
_FACTS = ("ds_id", "ds_shape", "ds_numel", "ds_active_sub_modules", "ds_status", "ds_tensor")

_numbers = itertools.count()


@dataclass(eq=False)
class Membership:
    """Where a parameter's values are.

    number: its place in an order that is the same on all ranks, but for gaps where a rank has parameters of its own.
    name: what the ranks of its axis call it among themselves. axis: the ranks that hold the model. group: None for
    what is in no group. residence: brings the weights together; None where they are always whole. lifecycle: the
    engine's, once there is one. gatherers: who asked for it to be gathered and is not done, the outermost first.
    """

    number: int
    axis: MeshAxis
    group: ShardGroup | None
    slot: int
    residence: Residence | None
    lifecycle: Lifecycle | None
    gatherers: list[Any] = field(default_factory=list)
    name: int = field(init=False)

    def __post_init__(self) -> None:
        known = _known_on(self.axis)
        self.name = next(known.names)
        known.places[self.name] = self

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled parameter is an ordinary one


@dataclass
class _Known:
    """What the ranks of one process group have registered, in an order that is theirs."""

    names: Iterator[int] = field(default_factory=itertools.count)
    places: weakref.WeakValueDictionary[int, Membership] = field(default_factory=weakref.WeakValueDictionary)


_alone = _Known()
_together: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()  # by process group


def _known_on(axis: MeshAxis) -> _Known:
    return _alone if axis.group is None else _together.setdefault(axis.group, _Known())


def place_of(param: Any) -> Membership | None:
    """Return where a parameter's values are; None for anything that stage 3 does not know."""
    return getattr(param, _PLACE, None) if isinstance(param, nn.Parameter) else None


def place_named(name: int, axis: MeshAxis) -> Membership:
    """Return what another rank of the axis calls so."""
    return _known_on(axis).places[name]


def registered_over() -> MeshAxis | None:
    """Return the axis of all ranks if parameters have been registered over it, which all of them know alike."""
    axis = world_axis() if is_initialized() else None
    return axis if axis is not None and axis.group in _together else None


def register(
    groups: Sequence[ShardGroup], axis: MeshAxis, residence: Residence, lifecycle: Lifecycle | None = None
) -> None:
    """Give the parameters of `groups` their attributes; ranks register the same ones in the same order."""
    for group in groups:
        is_sharded = group.weights is not None
        pieces = {piece.slot: piece for piece in group.layout.fragments(group.wire.axis.rank)}
        for slot, (param, shape) in enumerate(zip(group.params, group.shapes, strict=True)):
            place = Membership(
                next(_numbers),
                axis,
                group,
                slot,
                residence if is_sharded else None,
                lifecycle if is_sharded else None,
            )
            _write(param, place, torch.Size(shape))
            param.ds_tensor = _view_of(group.kept, pieces.get(slot))  # type: ignore[attr-defined]
            if not is_sharded:
                set_status(param, ZeroParamStatus.AVAILABLE)


def register_whole(params: Iterable[nn.Parameter], axis: MeshAxis) -> None:
    """Give parameters that every rank keeps whole, in no group, their attributes."""
    for param in params:
        _write(param, Membership(next(_numbers), axis, None, 0, None, None), param.shape)
        set_status(param, ZeroParamStatus.AVAILABLE)


def unregister(param: nn.Parameter) -> None:
    """Take the attributes away again."""
    for name in (_PLACE, *_FACTS):
        param.__dict__.pop(name, None)


def _view_of(kept: Tensor, piece: Fragment | None) -> Tensor:
    return kept[:0] if piece is None else kept.narrow(0, piece.shard_offset, piece.numel)


def _write(param: nn.Parameter, place: Membership, shape: torch.Size) -> None:
    facts = {"ds_id": place.number, "ds_shape": shape, "ds_numel": math.prod(shape), "ds_active_sub_modules": set()}
    for name, value in {_PLACE: place, **facts}.items():
        setattr(param, name, value)


def whole_shape(param: Tensor) -> torch.Size:
    """Return a parameter's shape when it is whole."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape
