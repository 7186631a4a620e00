"""Carries requests out in pieces, on a pool of threads that wait for the disk outside the interpreter's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import NamedTuple

from craken.disk.pieces import Piece, cut
from craken.disk.settings import ALIGNMENT_BYTES, IoSettings
from craken.disk.traffic import Meter, Traffic
from craken.disk.transfer import OpenFile, read_piece, write_piece

_STACK_BYTES = 512 << 10
_Transfer = Callable[[OpenFile, Piece, memoryview], None]


class Request(NamedTuple):
    """A range of a file, the memory that goes with it and its address, and how errors call it."""

    file: OpenFile
    offset: int
    memory: memoryview
    address: int
    name: str


class Ticket:
    """A request on its way: wait for it before its memory, or its range of the file, is used again."""

    def __init__(self, name: str, pieces: Sequence[Future[None]]) -> None:
        self._name = name
        self._pieces = pieces

    @property
    def is_done(self) -> bool:
        return all(piece.done() for piece in self._pieces)

    def wait(self) -> None:
        """Return when all bytes have arrived; OSError, once nothing is on its way any more, when some did not."""
        wait(self._pieces)
        for piece in self._pieces:
            error = piece.exception()
            if isinstance(error, OSError):
                raise OSError(error.errno, f"{self._name} failed: {error.strerror}") from error
            if error is not None:
                raise RuntimeError(f"{self._name} failed: {error}") from error


class Mover:
    """A pool of threads with its settings and its count of bytes; the threads end with it, or at `close`."""

    def __init__(self, settings: IoSettings) -> None:
        self.settings = settings
        self._threads = ThreadPoolExecutor(settings.num_threads, thread_name_prefix="craken-disk")
        self._reads, self._writes, self._both = Meter(), Meter(), Meter()

    def read(self, request: Request) -> Ticket:
        return self._start(request, read_piece, self._reads)

    def write(self, request: Request) -> Ticket:
        return self._start(request, write_piece, self._writes)

    def traffic(self) -> Traffic:
        reads, writes = self._reads, self._writes
        return Traffic(reads.num_bytes, reads.busy_s, writes.num_bytes, writes.busy_s, self._both.busy_s)

    def close(self) -> None:
        """Finish what is on its way, then end the threads."""
        self._threads.shutdown(wait=True)

    def _start(self, request: Request, transfer: _Transfer, meter: Meter) -> Ticket:
        alignment = ALIGNMENT_BYTES if request.file.is_direct else 1
        offset, memory = request.offset, request.memory
        pieces = cut(offset, len(memory), request.address, self.settings.piece_bytes, alignment=alignment)
        parts = [memory[piece.offset - offset :][: piece.num_bytes] for piece in pieces]
        with _small_stacks():
            started = [
                self._threads.submit(_run, transfer, (meter, self._both), request.file, piece, part)
                for piece, part in zip(pieces, parts, strict=True)
            ]
        return Ticket(request.name, started)


@contextmanager
def _small_stacks() -> Iterator[None]:
    """Give threads that start inside small stacks: the system's 8 MiB each count against limits of memory."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(before)


def _run(transfer: _Transfer, meters: tuple[Meter, Meter], file: OpenFile, piece: Piece, memory: memoryview) -> None:
    one_way, either_way = meters
    with either_way.moving(piece.num_bytes), one_way.moving(piece.num_bytes):
        transfer(file, piece, memory)
