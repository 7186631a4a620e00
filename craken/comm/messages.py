"""Control messages of a gloo group, point to point: every rank sends its bytes to every other.

gloo's own collectives run on a worker thread. That costs twice the time of an exchange (500 us against 250 at two
ranks), and the thread takes Python's lock at its end to let go of the tensors: when the process leaves right after a
collective, the interpreter goes down first and the thread dies inside C++ ("terminate called without an active
exception", exit code 134). Messages have no such thread.

Every rank makes the same calls over a group in the same order; a message's tag is its call's number.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from craken.comm.mesh import MeshAxis
from craken.comm.watchdog import Call, Exchange, RanksDisagreeError

CONTROL = 1023  # the transport number, of 0 to 1023, that control messages use
CALLS_A_TRANSPORT = 1 << 20  # tags are 31 bits

_calls: WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = WeakKeyDictionary()


def sums(vector: Tensor, axis: MeshAxis) -> Tensor:
    """Collective over `axis`: return the sum over ranks, added in rank order: the same on all to the bit."""
    inbox = {peer: torch.empty_like(vector) for peer in _peers(axis)}
    exchange(vector, inbox, axis, "a sum over ranks")
    first, second, *others = [vector if rank == axis.rank else inbox[rank] for rank in range(axis.size)]
    total = first + second
    for term in others:
        total += term
    return total


def objects(obj: Any, axis: MeshAxis) -> list[Any]:
    """Collective over `axis`: return every rank's `obj`, in rank order, on all ranks."""
    mine = _pickled(obj)
    lengths = {peer: torch.empty(1, dtype=torch.int64, device="cpu") for peer in _peers(axis)}
    exchange(torch.tensor([mine.numel()], device="cpu"), lengths, axis, "the sizes of objects")
    inbox = {peer: torch.empty(int(length), dtype=torch.uint8, device="cpu") for peer, length in lengths.items()}
    exchange(mine, inbox, axis, "objects")
    return [obj if rank == axis.rank else _unpickled(inbox[rank]) for rank in range(axis.size)]


def meet(axis: MeshAxis) -> None:
    """Collective over `axis`: return once every rank has come here."""
    token = torch.zeros(1, dtype=torch.uint8, device="cpu")
    exchange(token, {peer: torch.empty_like(token) for peer in _peers(axis)}, axis, "a barrier")


def exchange(outgoing: Tensor, inbox: Mapping[int, Tensor], axis: MeshAxis, what: str) -> None:
    """Collective over `axis`: send `outgoing` to every peer and fill `inbox` (peer -> tensor) with theirs."""
    group = axis.group
    assert group is not None, "an axis of several ranks has a group"
    calls = _calls.get(group) or _calls.setdefault(group, itertools.count())
    tag = CONTROL * CALLS_A_TRANSPORT + next(calls) % CALLS_A_TRANSPORT
    sends = [outgoing] * len(inbox)
    try:
        Exchange(Call(what, tag, axis), list(inbox), sends=sends, receives=list(inbox.values())).wait()
    except RanksDisagreeError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} did not complete: {error}. Another rank died, stands still, or took another way; look for the "
            "first traceback among the other ranks"
        ) from error


def _peers(axis: MeshAxis) -> Sequence[int]:
    return [rank for rank in range(axis.size) if rank != axis.rank]


def _pickled(obj: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)


def _unpickled(message: Tensor) -> Any:
    return pickle.loads(message.numpy().tobytes())
