"""A bounded set of host buffers between files and their users: read into ahead of use, written from behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from craken.disk import Ticket, pages, round_up


class _Leaving(NamedTuple):
    """A buffer whose contents are being written, and by which requests."""

    buffer: Tensor
    tickets: Sequence[Ticket]


class Courier:
    """At most `num_buffers` buffers, page-aligned, page-locked if asked; each as large as the largest one asked for."""

    def __init__(self, num_buffers: int, *, pins: bool) -> None:
        self._num_buffers, self._pins = max(1, num_buffers), pins
        self._size = 0
        self._free: list[Tensor] = []
        self._num_out = 0
        self._leaving: deque[_Leaving] = deque()

    def can_take(self, *, spare: int = 0) -> bool:
        """Say whether a buffer is free, or its writes are done, and `spare` others besides."""
        while self._leaving and all(ticket.is_done for ticket in self._leaving[0].tickets):
            self._arrive()
        return self._num_out + len(self._leaving) + spare < self._num_buffers

    def take(self, num_bytes: int) -> Tensor:
        """Return a buffer (uint8, at least num_bytes), once the oldest write is done if all are in use."""
        while not self.can_take():
            if not self._leaving:
                raise RuntimeError(f"all {self._num_buffers} buffers are in use; raise buffer_count")
            self._arrive()
        if num_bytes > self._size:
            self._size, self._free = round_up(num_bytes), []
        self._num_out += 1
        return self._free.pop() if self._free else pages(self._size, pinned=self._pins)

    def give_back(self, buffer: Tensor) -> None:
        """Take a buffer back that nothing moves into or out of."""
        self._num_out -= 1
        if buffer.numel() == self._size:
            self._free.append(buffer)

    def give_back_after(self, buffer: Tensor, tickets: Sequence[Ticket]) -> None:
        """Take a buffer back once these writes are done, whose failures the next call raises."""
        self._num_out -= 1
        self._leaving.append(_Leaving(buffer, tickets))

    def wait(self) -> None:
        """Return when every write is done."""
        while self._leaving:
            self._arrive()

    def _arrive(self) -> None:
        buffer, tickets = self._leaving.popleft()
        for ticket in tickets:
            ticket.wait()
        if buffer.numel() == self._size:
            self._free.append(buffer)
