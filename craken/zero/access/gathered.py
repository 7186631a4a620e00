"""Weights that are kept as shards, as their users see them: `GatheredParameters` and parameters read elsewhere.

    with GatheredParameters(a):                             a's group is whole from here on
        with GatheredParameters([a, b], modifier_rank=0):   a is left to the outer block; b is this one's
            b.data.mul_(2)
        b: rank 0's values go to all ranks and into the shards; a group that nobody else needs is freed
    a: what was written to it is lost

Who gathered a parameter first answers for it, whatever else is in its group.

A block with a modifier is led by that rank: what it reads besides, of a model without an engine, it borrows until the
block ends. The others gather the same in the same order, when they read it or at the end of the block at the latest,
so code inside may run on the modifier rank alone, as in functions that initialise weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from craken.comm import MeshAxis, broadcast, broadcast_object
from craken.zero.access.attributes import Membership, place_named, place_of, registered_over, unregister
from craken.zero.group import ShardGroup
from craken.zero.hooks import watch_start
from craken.zero.residence import Residence

_EXTERNAL = "_craken_external"  # attribute of a module: id of parameter -> _External
_MAX_LENT_NUMEL = 8 << 20  # elements lent at a time
_MIN_LOANS = 4  # whatever their size: a weight may be made from others


class _Asked(NamedTuple):
    param: nn.Parameter
    place: Membership


class _Before(NamedTuple):
    """What a parameter that is always whole was: where its values lie, and a copy of them."""

    param: nn.Parameter
    where: Tensor
    values: Tensor


class _Said(NamedTuple):
    """What the modifier rank of a block tells the others: a loan begins or ends, or the block does."""

    verb: Literal["lend", "return", "end"]
    name: int = 0  # of the parameter that is lent or returned
    refused: tuple[str, ...] = ()  # parameters whose `.data` has another shape now


class GatheredParameters:
    """Have parameters whole inside the block. Collective over all ranks at its beginning, with a modifier at its end.

    params: a parameter or any iterable of them; None, buffers, ordinary parameters and duplicates are passed over, and
    so are those that an outer block has gathered. modifier_rank: the rank whose edits (in place, `.data = ...`) become
    everybody's; None discards edits, when the weights are freed. fwd_module: the module whose forward uses them, in
    which they are there from now on, and again in its backward. The order of `params` may differ between ranks.
    """

    def __init__(
        self,
        params: Tensor | Iterable[Tensor | None] | None,
        modifier_rank: int | None = None,
        fwd_module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        listed = _listed(params) if enabled else []
        found = {asked.place.number: asked for asked in _known(listed)}
        self._asked = [found[number] for number in sorted(found)]
        self._axis = self._asked[0].place.axis if self._asked else registered_over()
        if self._axis is not None and modifier_rank is not None:
            _check_rank(modifier_rank, self._axis.size)
        self._modifier, self._reader = modifier_rank, fwd_module
        self._leads = enabled and modifier_rank is not None
        self._mine: list[_Asked] = []  # with what is borrowed, in the order of borrowing
        self._loans: list[_Asked] = []
        self._end: _Said | None = None
        self._before: list[_Before] = []
        self._endings: dict[object, Callable[[], None]] = {}

    def __enter__(self) -> None:
        try:
            self._gather()
        except BaseException:  # out of memory, say, which whoever asks may get over
            self._release(self._asked, self._mine)
            self._mine, self._before = [], []
            raise
        if self._leads and (self._mine or not self._asked):  # else an outer block has all, perhaps on this rank alone
            _led.append(self)

    def _gather(self) -> None:
        is_shared = self._leads and bool(_led) and _led[0]._modifier == self._modifier
        for param, place in self._asked:
            if is_shared:
                was_read(param)  # the outermost lends it: this block may be the leading rank's alone
            if place.gatherers:
                place.gatherers[0].give_way()
            place.gatherers.append(self)
        self._mine = [asked for asked in self._asked if asked.place.gatherers[0] is self]
        self._before = [
            _Before(param, param.data, param.data.clone()) for param, place in self._mine if place.residence is None
        ]
        for residence, group in _residences(self._mine):
            residence.pin(group, self)
        if self._reader is not None:
            for param, place in self._mine:
                if place.residence is not None and not _hold(param):
                    register_external_parameter(self._reader, param)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        has_lent = bool(_led) and _led[0] is self  # or may have, on the leading rank: the others follow it to its end
        if self in _led:
            _led.remove(self)
        try:
            for ending in self._endings.values():
                ending()
            if self._modifier is not None and kind is None and (self._mine or has_lent):
                self._publish_all(self._modifier)
                self._before = []
        finally:
            asked, mine = [*self._asked, *self._loans], self._mine
            self._mine, self._loans, self._end, self._endings = [], [], None, {}
            for param, where, values in self._before:
                where.copy_(values)
                param.data = where
            self._before = []
            overlaps = self._release(asked, mine)
        if overlaps and kind is None:
            raise RuntimeError(
                f"GatheredParameters: {overlaps} parameter(s) of this block are still used by another one that began "
                "inside of it and has not ended; leave blocks in the opposite order, or gather each parameter once"
            )

    def before_end(self, who: object, call: Callable[[], None]) -> None:
        """Have `call` called when the block ends, while what it has gathered is whole: the first one of each `who`."""
        self._endings.setdefault(who, call)

    def borrow(self, param: nn.Parameter, place: Membership) -> None:
        """Have a parameter whole that the block's code reads. Led by the modifier rank: others follow it.

        A rank that reads what the modifier rank does not is left with the placeholder.
        """
        assert self._modifier is not None
        if self._axis is None or place.axis.group is not self._axis.group:
            return  # nobody follows over other ranks than the block's
        if place.axis.rank != self._modifier:
            while not place.gatherers and self._end is None:
                self._follow(place.axis, self._modifier)
            return
        self._tell(_Said("lend", place.name), place.axis)
        while are_too_many([loan.param for loan in self._loans]):
            idle = [loan for loan in self._loans[:-1] if len(loan.place.gatherers) == 1]  # no block inside counts on it
            if not idle:
                break
            self._tell(_Said("return", idle[0].place.name), place.axis)

    def _tell(self, said: _Said, axis: MeshAxis) -> None:
        broadcast_object(said, axis, axis.rank)
        self._do(said, axis, axis.rank)

    def _follow(self, axis: MeshAxis, source: int) -> None:
        self._do(broadcast_object(None, axis, source), axis, source)

    def _do(self, said: _Said, axis: MeshAxis, source: int) -> None:
        """Collective: what the modifier rank said."""
        if said.verb == "end":
            self._end = said
            return
        place = place_named(said.name, axis)
        if said.verb == "lend":
            assert place.group is not None
            assert place.residence is not None
            loan = _Asked(place.group.params[place.slot], place)
            place.gatherers.append(self)
            self._mine.append(loan)
            self._loans.append(loan)
            place.residence.pin(place.group, self)
        else:
            loan = next(loan for loan in self._loans if loan.place is place)
            self._loans = [other for other in self._loans if other is not loan]
            self._mine = [other for other in self._mine if other is not loan]
            _publish(loan, source)
            self._release([loan], [loan])

    def _publish_all(self, source: int) -> None:
        """Collective: make rank `source`'s values everybody's; all ranks raise or none, before the first is sent."""
        axis = self._axis
        if axis is None:  # no parameter is known on any rank
            return
        if axis.rank == source:
            self._tell(_Said("end", refused=_reshaped(self._mine)), axis)
        while self._end is None:
            self._follow(axis, source)
        if self._end.refused:
            raise ValueError(
                f"GatheredParameters: rank {source} gave `.data` of another shape: "
                f"{', '.join(self._end.refused[:4])}; shapes stay, to change one put a new Parameter into the module"
            )
        for asked in self._mine:
            _publish(asked, source)

    def give_way(self) -> None:
        """End, if that may be, because a block inside of this one asks for the same parameter; blocks of users stay."""

    def _release(self, asked: Sequence[_Asked], mine: Sequence[_Asked]) -> int:
        """Let go of what this block asked for and gathered; returns how much of it others still count on."""
        for _, place in asked:
            if self in place.gatherers:  # if a gather has failed, not all that come after it know of this block
                place.gatherers.remove(self)
        for param, place in mine:
            group = place.group
            is_whole = group is not None and (group.weights is None or group.weights.is_whole)
            if group is not None and is_whole and place_of(param) is place:
                param.data = group.view_of(place.slot)  # what `.data = ...` put in its place goes
        for residence, group in _residences(mine):
            residence.unpin(group, self)
        return sum(bool(place.gatherers) for _, place in mine)


def _known(tensors: Iterable[Tensor | None]) -> Iterator[_Asked]:
    for tensor in tensors:
        place = place_of(tensor)
        if place is not None and isinstance(tensor, nn.Parameter):
            yield _Asked(tensor, place)


def _residences(mine: Sequence[_Asked]) -> list[tuple[Residence, ShardGroup]]:
    """Return the groups to bring together, once each, in an order that all ranks share."""
    places = {
        id(place.group): (place.residence, place.group)
        for _, place in mine
        if place.residence is not None and place.group is not None
    }
    return list(places.values())


def _listed(params: Any) -> list[Any]:
    """Return what was asked for as a list; TypeError for modules or names alone, which would gather nothing."""
    if params is None or isinstance(params, Tensor):
        return [params]
    listed = list(params) if isinstance(params, Iterable) else [params]
    if not any(isinstance(entry, Tensor) for entry in listed):
        wrong = next((entry for entry in listed if isinstance(entry, (nn.Module, tuple, str))), None)
        if wrong is not None:
            raise TypeError(
                f"GatheredParameters: expected parameters, got a {type(wrong).__name__}; pass model.parameters(), or "
                "the second of each pair of model.named_parameters()"
            )
    return listed


def _check_rank(modifier_rank: int, num_ranks: int) -> None:
    if not 0 <= modifier_rank < num_ranks:
        raise ValueError(
            f"GatheredParameters: modifier_rank is {modifier_rank}, expected a rank from 0 to {num_ranks - 1}"
        )


def _reshaped(mine: Sequence[_Asked]) -> tuple[str, ...]:
    return tuple(
        f"{tuple(param.shape)} in place of {tuple(param.ds_shape)}"  # type: ignore[attr-defined]
        for param, _ in mine
        if param.shape != param.ds_shape  # type: ignore[attr-defined]
    )


def _publish(asked: _Asked, source: int) -> None:
    """Collective: make rank `source`'s values of a whole parameter everybody's, shards and masters included."""
    param, place = asked
    label = "a parameter (edited)" if place.group is None else f"{place.group.names[place.slot]} (edited)"
    edited, kept = param.data, param.data if place.group is None else place.group.view_of(place.slot)
    if place.axis.rank == source and edited.data_ptr() != kept.data_ptr():
        kept.copy_(edited)
    flat = kept.contiguous().view(-1)
    broadcast(flat.view(torch.uint8), place.axis, label=label, source=source)  # bytes: every dtype travels
    if not kept.is_contiguous():
        kept.copy_(flat.view(kept.shape))
    if place.group is not None:
        param.data = kept
        place.group.keep_edit(place.slot)


def are_too_many(lent: Sequence[nn.Parameter]) -> bool:
    """Say whether the first of these parameters, which are lent beside what a user asked for, should go."""
    return len(lent) > _MIN_LOANS and sum(param.numel() for param in lent) > _MAX_LENT_NUMEL


def block_that_discards(param: Tensor) -> GatheredParameters | None:
    """Return the block that answers for a parameter, if there is one and it has no modifier."""
    place = place_of(param)
    block: GatheredParameters | None = place.gatherers[0] if place is not None and place.gatherers else None
    return block if block is not None and block._modifier is None else None


_led: list[GatheredParameters] = []  # blocks with a modifier that are open, the outermost first


def was_read(param: Any) -> None:
    """Collective, or led by one rank: have a parameter of a model without an engine whole for the open block's code."""
    place = place_of(param)
    if _led and place is not None and place.residence is not None and not place.gatherers and place.lifecycle is None:
        _led[0].borrow(param, place)  # blocks inside may be the leading rank's alone


# --- weights that a forward uses though they are another module's -----------------------------------------------------


class _External(NamedTuple):
    param: nn.Parameter
    handle: RemovableHandle


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Have `parameter` whole in every forward of `module`, and for the backward of that, though it is another module's.

    Needed only for what is not read as an attribute of its owner (`head.weight`): such reads are noticed. May be called
    before `initialize`.
    """
    if not isinstance(module, nn.Module) or not isinstance(parameter, nn.Parameter):
        raise ValueError(
            "register_external_parameter(module, parameter): expected a torch.nn.Module and a torch.nn.Parameter, got "
            f"{type(module).__name__} and {type(parameter).__name__}"
        )
    known = module.__dict__.setdefault(_EXTERNAL, {})
    if id(parameter) not in known:
        known[id(parameter)] = _External(parameter, watch_start(module, partial(_hold, parameter)))


def unregister_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Undo `register_external_parameter`; ValueError if it was not called."""
    known = module.__dict__.get(_EXTERNAL, {})
    if id(parameter) not in known:
        raise ValueError("unregister_external_parameter: this parameter was not registered with this module")
    known.pop(id(parameter)).handle.remove()


def external_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return what was registered with a module."""
    return [external.param for external in module.__dict__.get(_EXTERNAL, {}).values()]


def _hold(param: nn.Parameter) -> bool:
    """Collective unless it is whole: have `param` whole for the forward that runs, if one does, and its backward."""
    place = place_of(param)
    if place is None or place.group is None or place.lifecycle is None or not place.lifecycle.is_running():
        return False
    place.lifecycle.read_in_forward(place.group)
    return True


# --- weights that leave an engine -------------------------------------------------------------------------------------


def take_out(params: Sequence[nn.Parameter]) -> None:
    """Collective: give parameters that another engine keeps as shards whole tensors of their own again.

    One group is whole at a time, beside the tensors that come out. That engine's hooks leave the model: its weights are
    somebody else's from now on.
    """
    leaving = list(_known(params))
    who = object()
    for residence, group in _residences(leaving):
        residence.pin(group, who)
        for param, place in leaving:
            if place.group is group and group.weights is not None:
                param.data = param.data.clone()
                group.weights.forget(param)
        residence.unpin(group, who)
    for param, place in leaving:
        unregister(param)
        if place.lifecycle is not None:
            place.lifecycle.retire()
