"""Weights of which every rank keeps a shard: the whole comes for a use and goes after it, in one and the same storage.

    shard    [S]       always there
    full     [N*S]     there while whole; its memory is given back between uses
    nearby   [N*S/h]   where an inner axis of h ranks keeps a second copy: this rank's part of it

    inner axis    step | forward  backward | forward  backward | step | forward ...
    gathered over      | all      inner    | inner    inner    |      | all             [Note: nearby copies]

[Note: nearby copies] (hpZ of ZeRO++, arXiv 2306.10209) The first gather after the shards have changed runs over all
ranks and leaves `nearby` behind; those that follow run over the inner axis, whose links are faster, until the shards
change again.

Parameters are views of `full` while it is whole and empty placeholders (1-D, no elements) otherwise. Autograd saves
aliases of weights (F.linear a transposed view): since the memory comes back in place, they are right again as soon as
the weights are gathered for backward. Reading them before that reads memory that is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from craken.comm import MeshAxis, Pending, Waitable
from craken.disk import Ticket
from craken.zero.flat import check_has_memory, own_part
from craken.zero.memory.link import Arrival
from craken.zero.memory.room import Room, room_for
from craken.zero.memory.shelf import Resting
from craken.zero.plans.layout import GroupLayout
from craken.zero.rules import Sources, Wire


class ZeroParamStatus(Enum):
    """Whether a parameter's values are there to be read."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def set_status(param: nn.Parameter, status: ZeroParamStatus) -> None:
    """Write the status where clients read it."""
    param.ds_status = status  # type: ignore[attr-defined]


class ShardedWeights:
    """The flat weights of one shard group: freed -> being gathered -> whole -> freed."""

    def __init__(self, shard: Resting, params: Sequence[nn.Parameter], layout: GroupLayout, wire: Wire) -> None:
        """shard: this rank's [shard_numel]. `params` are whole, elsewhere, and let go of that memory."""
        self._params = list(params)
        self._slots = list(layout.slots)
        self._shapes = [param.shape for param in params]
        self._link, self.shard, self._file = wire.shelf.link, shard.flat, shard.file
        if shard.file is not None:
            self._courier = wire.shelf.courier("weights")
        self._coming: tuple[Tensor, Ticket] | None = None
        self._placeholder = torch.empty(0, dtype=self.shard.dtype, device=wire.device)
        self._room = room_for(layout.padded_numel, self.shard.dtype, wire.device, wire.shelf.idle_pages)
        self.full = self._room.flat
        self._own = own_part(self.full, layout, wire.axis.rank)
        self._nearby: Room | None = None
        self._nearby_is_valid = self._nearby_is_exact = False
        self._work: Pending | None = None
        self._fills: MeshAxis | None = None
        self._arrival = Arrival()
        self.is_whole, self._is_exact = True, True
        self.free()

    def forget(self, param: nn.Parameter) -> None:
        """Let go of a parameter that lives elsewhere from now on; its place in the buffers stays."""
        at = next(index for index, mine in enumerate(self._params) if mine is param)
        del self._params[at], self._slots[at], self._shapes[at]

    def shards_changed(self) -> None:
        """Take note that the shards have new values, on every rank: second copies and what was read are out of date."""
        self._nearby_is_valid = False
        self.forget_fetched()

    def start(self, sources: Sources, label: str, *, exact: bool = False) -> None:
        """Collective: begin to gather the whole (`exact`: as the shards hold it), unless that is under way already."""
        if self._work is not None and (self._is_exact or not exact):
            return
        self.finish()
        if not self.is_whole:
            self._room.take()
        try:
            if self._nearby_is_valid and (self._nearby_is_exact or not exact):
                self._start_nearby(sources, label)
            else:
                self._start_from_shards(sources, label, exact=exact)
        except BaseException:
            if not self.is_whole:
                self._room.give_back()
            raise

    def _start_from_shards(self, sources: Sources, label: str, *, exact: bool) -> None:
        transport = sources.exact if exact else sources.quick
        self._is_exact = transport is sources.exact
        if sources.inner is not None and not self._nearby_is_valid:
            self._fills = sources.inner.axis
        is_away = self.shard.device != self.full.device
        with self._link.beside("up") if is_away else contextlib.nullcontext():
            self._bring_own()
            self._work = transport.all_gather(self.full, label=label)

    def _bring_own(self) -> None:
        check_has_memory(self.shard)
        if self._file is None:
            self._own.copy_(self.shard, non_blocking=True)
            self._arrival = self._link.mark()
            return
        self._begin_reading()
        assert self._coming is not None
        (buffer, ticket), self._coming = self._coming, None
        ticket.wait()
        self._own.copy_(self._in(buffer), non_blocking=True)
        self._link.mark().wait_on_host()
        self._courier.give_back(buffer)

    def fetch(self) -> None:
        """Begin to read a shard that rests in a file, if there is a buffer for it."""
        is_needed = self._file is not None and not self.is_whole and self._work is None and not self._nearby_is_valid
        if is_needed and self._courier.can_take(spare=1):
            self._begin_reading()

    @property
    def is_in_file(self) -> bool:
        return self._file is not None

    def forget_fetched(self) -> None:
        """Drop what was read ahead of use."""
        if self._coming is not None:
            (buffer, ticket), self._coming = self._coming, None
            ticket.wait()
            self._courier.give_back(buffer)

    def store(self, values: Tensor) -> list[Waitable]:
        """Make `values` [shard_numel], in any dtype, the shard; returns what is to be waited for before a gather."""
        if self._file is None:
            self.shard.copy_(values)
            return []
        buffer = self._courier.take(self.shard.nbytes)
        ticket = self._file.write(self._in(buffer).copy_(values))
        self._courier.give_back_after(buffer, [ticket])
        return [self._courier]

    def _begin_reading(self) -> None:
        if self._coming is None:
            assert self._file is not None
            buffer = self._courier.take(self.shard.nbytes)
            self._coming = (buffer, self._file.read(self._in(buffer)))

    def _in(self, buffer: Tensor) -> Tensor:
        return buffer[: self.shard.nbytes].view(self.shard.dtype)

    def _start_nearby(self, sources: Sources, label: str) -> None:
        assert sources.inner is not None
        assert self._nearby is not None
        self._is_exact = self._nearby_is_exact
        self._part(sources.inner.axis).copy_(self._nearby.flat)
        self._work = sources.inner.transport.all_gather(self.full, label=label)

    def _part(self, axis: MeshAxis) -> Tensor:
        """Return this rank's part of the whole among the ranks of an inner axis."""
        numel = self.full.numel() // axis.size
        return self.full.narrow(0, axis.rank * numel, numel)

    def finish(self) -> None:
        """Wait until the whole is there and let the parameters show it."""
        if self._work is None:
            return
        self._wait(self._work)
        for param, slot, shape in zip(self._params, self._slots, self._shapes, strict=True):
            param.data = self.full.narrow(0, slot.offset, slot.numel).view(shape)
            set_status(param, ZeroParamStatus.AVAILABLE)
        self.is_whole = True

    def free(self) -> None:
        """Give the whole back; what was written into the parameters is lost."""
        if self._work is not None:
            self._wait(self._work)
        elif not self.is_whole:
            return
        for param in self._params:
            param.data = self._placeholder
            set_status(param, ZeroParamStatus.NOT_AVAILABLE)
        self._room.give_back()
        self.is_whole = False

    def _wait(self, work: Pending) -> None:
        self._work = None
        work.wait()
        self._arrival.wait()
        axis, self._fills = self._fills, None
        if axis is not None:
            self._keep_nearby(self._part(axis))

    def _keep_nearby(self, part: Tensor) -> None:
        if self._nearby is None:
            self._nearby = room_for(part.numel(), part.dtype, part.device)
        self._nearby.flat.copy_(part)
        self._nearby_is_valid, self._nearby_is_exact = True, self._is_exact

    @property
    def nearby(self) -> list[Tensor]:
        """This rank's part of the second copy, which lies on the device; empty where there is none."""
        return [] if self._nearby is None else [self._nearby.flat]

    @property
    def num_bytes(self) -> int:
        """Bytes that the whole takes now."""
        return self._room.num_bytes
