"""What went over the wire: a running count of bytes, and a log of events while somebody listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Event:
    """One collective, as this rank issued it. `numel` counts the full tensor, `sent_numel` what this rank sent.

    `axis` is the name of the mesh axis whose ranks took part.
    """

    op: str
    label: str
    numel: int
    sent_numel: int
    dtype: torch.dtype
    axis: str

    @property
    def bytes_sent(self) -> int:
        return self.sent_numel * self.dtype.itemsize


class _Ledger:
    def __init__(self) -> None:
        self.bytes_sent = 0
        self.listeners: list[list[Event]] = []


_ledger = _Ledger()


def record(op: str, label: str, numel: int, sent_numel: int, dtype: torch.dtype, axis: str) -> None:
    """Count one collective; called by every verb of this room when it is issued."""
    _ledger.bytes_sent += sent_numel * dtype.itemsize
    if _ledger.listeners:
        event = Event(op, label, numel, sent_numel, dtype, axis)
        for listener in _ledger.listeners:
            listener.append(event)


def bytes_sent() -> int:
    """Return the bytes of tensor data that this process has put on the wire so far."""
    return _ledger.bytes_sent


@contextmanager
def event_log() -> Iterator[list[Event]]:
    """Collect the events issued inside the block, in order."""
    events: list[Event] = []
    _ledger.listeners.append(events)
    try:
        yield events
    finally:
        # by identity: two open logs with equal contents are equal lists
        _ledger.listeners = [kept for kept in _ledger.listeners if kept is not events]
