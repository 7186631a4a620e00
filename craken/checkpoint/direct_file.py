"""Writes a new file past the page cache, from aligned buffers that threads empty while the next one is filled.

    caller   fill 0   fill 1   fill 2   wait, fill 0   wait, fill 1 ...
    thread            write 0 .......   write 2 .......
    thread                     write 1 .......   write 0 .......

Two writes are under way, so that the disk has the next one when the first is through; bytes are copied without the
interpreter's lock, or a thread that is back from the disk would wait for it.

The page cache costs a processor as much as the disk takes: a copy, and a page to find for each 4 KiB. Here a byte is
copied once, into memory that is there already. Where the file system takes no direct writes, or not of such a size, the
same calls go through the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from craken.disk import pages, round_up, write_all

BUFFER_BYTES = 2 << 20
_NUM_BUFFERS = 3
_NUM_THREADS = 2
_Buffer = np.ndarray[Any, np.dtype[np.uint8]]
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A file that is written once, from its beginning to its end; after `finish` it is durable."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        size = min(BUFFER_BYTES, round_up(num_bytes))
        self._fd = fd
        self._error: Exception | None = None
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        self._full: SimpleQueue[tuple[_Buffer, int, int] | None] = SimpleQueue()  # buffer, bytes in it, offset
        for _ in range(min(_NUM_BUFFERS, -(-num_bytes // size))):
            self._free.put(pages(size).numpy())
        self._buffer, self._filled, self._offset = self._free.get(), 0, 0
        # no executor: those take no work once the interpreter is ending, when a save may still be under way
        self._threads: list[threading.Thread] = []
        for _ in range(_NUM_THREADS):
            thread = threading.Thread(target=self._empty_buffers, name="craken-checkpoint-disk")
            try:
                thread.start()
            except RuntimeError:  # a limit is near; one does the work of two
                if not self._threads:
                    raise
                break
            self._threads.append(thread)

    def write(self, data: memoryview) -> None:
        """Append `data`; OSError when an earlier part could not be written."""
        source = np.frombuffer(data, np.uint8)
        while len(source):
            part = source[: len(self._buffer) - self._filled]
            np.copyto(self._buffer[self._filled : self._filled + len(part)], part)
            self._filled, source = self._filled + len(part), source[len(part) :]
            if self._filled == len(self._buffer):
                self._send(self._filled)
                self._buffer, self._filled = self._free.get(), 0
                self._check()

    def finish(self) -> None:
        """Write what is left and make the file durable."""
        end = self._offset + self._filled
        if self._filled:
            padded = round_up(self._filled)
            self._buffer[self._filled : padded] = 0
            self._send(padded)
        self.stop()
        self._check()
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)

    def stop(self) -> None:
        """Wait until the threads have ended."""
        for _ in self._threads:
            self._full.put(None)
        for thread in self._threads:
            thread.join()

    def _send(self, num_bytes: int) -> None:
        self._full.put((self._buffer, num_bytes, self._offset))
        self._offset += num_bytes

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _empty_buffers(self) -> None:
        """What a thread does."""
        while (item := self._full.get()) is not None:
            buffer, num_bytes, offset = item
            try:
                if self._error is None:
                    _write(self._fd, buffer[:num_bytes].data, offset)
            except Exception as error:  # noqa: BLE001 - the caller raises it
                self._error = error
            finally:
                self._free.put(buffer)


@contextlib.contextmanager
def new_file(path: Path, num_bytes: int) -> Iterator[DirectFile]:
    """Create a file for `num_bytes`, above 0, that is durable once the block has ended well."""
    fd = _create(path)
    try:
        file = DirectFile(fd, num_bytes)
        try:
            yield file
            file.finish()
        finally:
            file.stop()
    finally:
        os.close(fd)


def _create(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some systems create the file before they refuse the flag
    return os.open(path, flags, 0o666)


def _write(fd: int, data: memoryview, offset: int) -> None:
    try:
        write_all(fd, data, offset)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # of a size or alignment that this disk does not take; another thread may have found out before
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_DIRECT)
        write_all(fd, data, offset)
