"""How the collectives of sharding are carried: point to point on gloo, the backend's own or an exchange on NCCL.

All work on a *full* flat buffer of size x shard_numel elements in which rank r owns elements [r*S, (r+1)*S):

    reduce-scatter   every rank's full  ->  the owner's shard holds the sum      sent: (N-1)/N of the full buffer
    all-gather       every owner's slice -> every rank's full buffer             sent: (N-1)/N of the full buffer
    all-to-all       every rank's slice r -> rank r, which keeps them apart      sent: (N-1)/N of the full buffer

gloo's own versions cost three to five times a plain exchange of the same bytes, and its sums of bf16 accumulate in
bf16. Point to point, each rank sends every other rank its slice and adds what it receives, in fp32, in the fixed order
own, own+1, ..., own-1: a shard's sum is the same to the bit whatever the stage. On NCCL 16-bit gradients go through an
all-to-all for the same reason, fp32 through its reduce-scatter.

Calls return a `Pending`; `wait()` completes it. A rank issues the same calls in the same order as all others: messages
carry a tag made from the call's number and its label, so ranks out of step wait (watchdog.py) rather than mix data.
NCCL pairs calls by their order alone: there ranks out of step wait as soon as a call's kind or size differs.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from craken.comm import events
from craken.comm.mesh import MeshAxis
from craken.comm.messages import CALLS_A_TRANSPORT, CONTROL
from craken.comm.objects import gather_objects
from craken.comm.watchdog import Call, Exchange, RanksDisagreeError, Started

_numbers = itertools.count()

# of a tag's 20 bits: more calls than are ever under way, and labels, of which two are the same once in 4096
_CALLS, _LABELS = 1 << 8, CALLS_A_TRANSPORT >> 8

reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Waitable(Protocol):
    def wait(self) -> object: ...


class Pending:
    """A collective under way. Buffers given to it belong to it until `wait` returns."""

    def __init__(self, works: Sequence[Waitable], finish: Callable[[], None] | None, context: str) -> None:
        self._works, self._finish, self._context = works, finish, context

    def wait(self) -> None:
        """Complete the collective: on CPU the data are there, on CUDA the current stream waits for them."""
        try:
            for work in self._works:
                work.wait()
        except RanksDisagreeError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{self._context} did not complete: {error}. Another rank died, stands still, or called backward() or "
                "step() a different number of times; look for the first traceback among the other ranks"
            ) from error
        finish, self._works, self._finish = self._finish, (), None
        if finish is not None:
            finish()


class Transport(Protocol):
    """Carries the collectives over one mesh axis."""

    def reduce_scatter(self, full: Tensor, own: Tensor, out: Tensor, *, add: bool, label: str) -> Pending:
        """Collective: start summing shards. The sum over ranks lands in (or with `add`, is added to) `out` at wait().

        full: [size * S] in the dtype that travels; own: [S], this rank's contribution to its own shard, in any float
        dtype (usually full's own slice); out: [S] in the accumulate dtype, may be the same memory as `own`.
        """

    def all_gather(self, full: Tensor, *, label: str) -> Pending:
        """Collective: start filling `full` [size * S] in place from every rank's own slice of it."""

    def all_to_all(self, outbox: Tensor, inbox: Tensor, *, label: str) -> Pending:
        """Collective: start sending row r of `outbox` [size, n] to rank r; row r of `inbox` is filled from rank r.

        A rank's row for itself is undefined in `inbox`.
        """


@dataclass(frozen=True)
class Channel:
    """A mesh axis and what carries collectives over it."""

    axis: MeshAxis
    transport: Transport


class PointToPoint:
    """Plain messages between every pair of ranks; for gloo."""

    def __init__(self, axis: MeshAxis, number: int) -> None:
        """`number` tells this transport's messages from those of others over the same ranks."""
        self._axis, self._calls = axis, 0
        self._first_tag = (number % CONTROL) * CALLS_A_TRANSPORT
        # own+1 first, so that at any moment every rank talks to another peer
        self._peers = [(axis.rank + step) % axis.size for step in range(1, axis.size)]

    def reduce_scatter(self, full: Tensor, own: Tensor, out: Tensor, *, add: bool, label: str) -> Pending:
        numel = full.numel() // self._axis.size
        _record("reduce_scatter", full, self._axis, label)
        received = [torch.empty(numel, dtype=full.dtype, device=full.device) for _ in self._peers]
        parts = torch.chunk(full, self._axis.size)
        what = f"reduce-scatter of {label}"
        exchange = self._exchange(what, sends=[parts[peer] for peer in self._peers], receives=received)
        return Pending([exchange], lambda: add_up(own, received, out, add=add), what)

    def all_gather(self, full: Tensor, *, label: str) -> Pending:
        _record("all_gather", full, self._axis, label)
        parts = torch.chunk(full, self._axis.size)
        mine = [parts[self._axis.rank]] * len(self._peers)
        what = f"all-gather of {label}"
        return Pending([self._exchange(what, sends=mine, receives=[parts[peer] for peer in self._peers])], None, what)

    def all_to_all(self, outbox: Tensor, inbox: Tensor, *, label: str) -> Pending:
        _record("all_to_all", outbox, self._axis, label)
        what = f"all-to-all of {label}"
        sends, receives = [outbox[peer] for peer in self._peers], [inbox[peer] for peer in self._peers]
        return Pending([self._exchange(what, sends=sends, receives=receives)], None, what)

    def _exchange(self, what: str, *, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Exchange:
        """Start one message to and one from every peer, given in the order of `_peers`."""
        tag = self._first_tag + (self._calls % _CALLS) * _LABELS + _number_of(what)
        self._calls += 1
        return Exchange(Call(what, tag, self._axis), self._peers, sends=sends, receives=receives)


class Native:
    """The backend's own collectives; sums of 16-bit gradients go through an all-to-all and are added in fp32."""

    def __init__(self, axis: MeshAxis) -> None:
        self._axis = axis

    def reduce_scatter(self, full: Tensor, own: Tensor, out: Tensor, *, add: bool, label: str) -> Pending:
        _record("reduce_scatter", full, self._axis, label)
        numel, rank = full.numel() // self._axis.size, self._axis.rank
        exchanged = full.dtype.itemsize < 4
        inbox = torch.empty(full.numel() if exchanged else numel, dtype=full.dtype, device=full.device)
        what = f"reduce-scatter of {label}"
        collective = dist.all_to_all_single if exchanged else reduce_scatter_single
        work = Started(what, self._axis, collective, inbox, full)

        def finish() -> None:
            if exchanged:
                parts = torch.split(inbox, numel)
                add_up(own, [*parts[rank + 1 :], *parts[:rank]], out, add=add)
            elif add:
                out.add_(inbox)
            else:
                out.copy_(inbox)

        return Pending([work], finish, what)

    def all_gather(self, full: Tensor, *, label: str) -> Pending:
        _record("all_gather", full, self._axis, label)
        numel = full.numel() // self._axis.size
        mine = full[self._axis.rank * numel : (self._axis.rank + 1) * numel]
        what = f"all-gather of {label}"
        return Pending([Started(what, self._axis, all_gather_single, full, mine)], None, what)

    def all_to_all(self, outbox: Tensor, inbox: Tensor, *, label: str) -> Pending:
        _record("all_to_all", outbox, self._axis, label)
        what = f"all-to-all of {label}"
        return Pending([Started(what, self._axis, dist.all_to_all_single, inbox, outbox)], None, what)


class Alone:
    """An axis of one rank: the sum is the rank's own contribution, and everything is gathered already."""

    def reduce_scatter(self, full: Tensor, own: Tensor, out: Tensor, *, add: bool, label: str) -> Pending:
        return Pending((), lambda: add_up(own, (), out, add=add), f"reduce-scatter of {label}")

    def all_gather(self, full: Tensor, *, label: str) -> Pending:
        return Pending((), None, f"all-gather of {label}")

    def all_to_all(self, outbox: Tensor, inbox: Tensor, *, label: str) -> Pending:
        return Pending((), None, f"all-to-all of {label}")


def transport_for(axis: MeshAxis) -> Transport:
    """Collective over `axis`: return what carries collectives best; the backend and the number of ranks decide."""
    if axis.size == 1:
        return Alone()
    if axis.backend == "nccl":
        return Native(axis)
    return PointToPoint(axis, max(gather_objects(next(_numbers), axis)))


def channel_over(axis: MeshAxis) -> Channel:
    """Collective over `axis`: return the axis with a transport of its own."""
    return Channel(axis, transport_for(axis))


def start_sum(values: Tensor, channel: Channel, *, label: str) -> Pending:
    """Collective: start summing `values` [n] over the channel's axis in place, to the same bits on all its ranks.

    A rank sums 1/N of the elements, in fp32 and rounded once, and hands them to the others: 2 (N-1)/N n are sent.
    """
    axis = channel.axis
    numel = -(-values.numel() // axis.size)
    padded = values
    if numel * axis.size != values.numel():
        padded = values.new_zeros(numel * axis.size)
        padded[: values.numel()].copy_(values)
    own = padded.narrow(0, axis.rank * numel, numel)
    scatter = channel.transport.reduce_scatter(padded, own, own, add=False, label=label)

    def finish() -> None:
        channel.transport.all_gather(padded, label=label).wait()
        if padded is not values:
            values.copy_(padded[: values.numel()])

    return Pending([scatter], finish, f"sum of {label} over {axis.name}")


@functools.lru_cache(maxsize=1 << 16)
def _number_of(label: str) -> int:
    return zlib.crc32(label.encode()) % _LABELS


def add_up(own: Tensor, received: Sequence[Tensor], out: Tensor, *, add: bool) -> None:
    """Write (or with `add`, add) own + received[0] + received[1] + ... into `out`, rounding to its dtype once.

    All are [S]; terms received may be overwritten. fp32 sums take one pass a term; with 16-bit terms the sum runs in
    fp32. fp32 terms are summed before they are added, so that with two ranks it does not matter which of them adds.
    """
    if add and received and own.dtype == received[0].dtype == out.dtype and out.dtype.itemsize >= 4:
        total = received[0].add_(own)
        for term in received[1:]:
            total.add_(term)
        out.add_(total)
    elif add and out.dtype.itemsize >= 4:
        for term in (own, *received):
            out.add_(term)
    elif add:
        total = own.float()
        for term in received:
            total = total + term
        out.add_(total)
    elif not received:
        if out.data_ptr() != own.data_ptr():
            out.copy_(own)
    elif own.dtype == received[0].dtype == out.dtype and (out.dtype.itemsize >= 4 or len(received) == 1):
        torch.add(own, received[0], out=out)
        for term in received[1:]:
            out.add_(term)
    else:
        total = own.float() if out.dtype.itemsize < 4 else out.copy_(own)
        for term in received:
            total.add_(term)
        if total is not out:
            out.copy_(total)


def _record(op: str, full: Tensor, axis: MeshAxis, label: str) -> None:
    if full.numel() % axis.size:
        raise ValueError(
            f"{op} of {label}: {full.numel()} elements do not divide by the {axis.size} ranks of {axis.name}"
        )
    events.record(op, label, full.numel(), full.numel() // axis.size * (axis.size - 1), full.dtype, axis.name)
