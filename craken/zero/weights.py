"""Weights of which every rank keeps a shard: the whole comes for a use and goes after it, in one and the same storage.

    shard   [S]    always there
    full    [N*S]  there while whole; its memory is given back between uses

Parameters are views of `full` while it is whole and empty placeholders (1-D, no elements) otherwise. Autograd saves
aliases of weights (F.linear a transposed view): since the memory comes back in place, they are right again as soon as
the weights are gathered for backward. Reading them before that reads memory that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from craken.comm import Pending, Transport
from craken.zero.layout import GroupLayout
from craken.zero.room import lasting_copy, room_for


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

    def __init__(self, values: Tensor, params: Sequence[nn.Parameter], layout: GroupLayout, rank: int) -> None:
        """values: [padded_numel]; nothing of it is kept but this rank's shard."""
        self._params = list(params)
        self._slots = list(layout.slots)
        self._shapes = [param.shape for param in params]
        self.shard = lasting_copy(values.narrow(0, rank * layout.shard_numel, layout.shard_numel))
        self._placeholder = torch.empty(0, dtype=values.dtype, device=values.device)
        self._room = room_for(layout.padded_numel, values.dtype, values.device)
        self.full = self._room.flat
        self._own = self.full.narrow(0, rank * layout.shard_numel, layout.shard_numel)
        self._work: Pending | None = None
        self.is_whole = True
        self.free()

    def forget(self, param: nn.Parameter) -> None:
        """Let go of a parameter that lives elsewhere from now on; its place in the buffers stays."""
        at = next(index for index, mine in enumerate(self._params) if mine is param)
        del self._params[at], self._slots[at], self._shapes[at]

    def start(self, transport: Transport, label: str) -> None:
        """Collective over the axis: begin to gather the whole, unless it is there or under way."""
        if self.is_whole or self._work is not None:
            return
        self._room.take()
        self._own.copy_(self.shard)
        self._work = transport.all_gather(self.full, label=label)

    def finish(self) -> None:
        """Wait until the whole is there and let the parameters show it."""
        if self._work is None:
            return
        work, self._work = self._work, None
        work.wait()
        for param, slot, shape in zip(self._params, self._slots, self._shapes, strict=True):
            param.data = self.full.narrow(0, slot.offset, slot.numel).view(shape)
            set_status(param, ZeroParamStatus.AVAILABLE)
        self.is_whole = True

    def free(self) -> None:
        """Give the whole back; what was written into the parameters is lost."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        elif not self.is_whole:
            return
        for param in self._params:
            param.data = self._placeholder
            set_status(param, ZeroParamStatus.NOT_AVAILABLE)
        self._room.give_back()
        self.is_whole = False

    @property
    def num_bytes(self) -> int:
        """Bytes that the whole takes now."""
        return self._room.num_bytes
