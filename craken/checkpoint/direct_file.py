"""Writes a new file past the page cache, from aligned buffers that a thread empties while the next one is filled.

    caller   fill 0   fill 1   fill 2   wait 0, fill 0 ...
    thread            write 0  write 1  write 2 ...

The page cache costs a processor as much as the disk takes: a copy, and a page to find for each 4 KiB. Here a byte is
copied once, into memory that is there already. Where the file system takes no direct writes, or not of such a size, the
same calls go through the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BUFFER_BYTES = 8 << 20
_NUM_BUFFERS = 3
_ALIGNMENT_BYTES = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A file that is written once, from its beginning to its end; `close` makes it durable."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        size = min(BUFFER_BYTES, -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES)
        self._fd = fd
        self._buffers = [memoryview(mmap.mmap(-1, size)) for _ in range(min(_NUM_BUFFERS, -(-num_bytes // size)))]
        self._writes: list[Future[None] | None] = [None] * len(self._buffers)
        self._thread = ThreadPoolExecutor(1)
        self._num_full, self._filled, self._size = 0, 0, size

    def write(self, data: memoryview) -> None:
        """Append `data`; OSError when an earlier part could not be written."""
        while len(data):
            buffer = self._buffers[self._num_full % len(self._buffers)]
            if self._filled == 0:
                self._wait(self._num_full % len(self._buffers))
            part = data[: self._size - self._filled]
            buffer[self._filled : self._filled + len(part)] = part
            self._filled, data = self._filled + len(part), data[len(part) :]
            if self._filled == self._size:
                self._send(buffer)

    def finish(self) -> None:
        """Write what is left and make the file durable."""
        end = self._num_full * self._size + self._filled
        if self._filled:
            padded = -(-self._filled // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            buffer = self._buffers[self._num_full % len(self._buffers)]
            buffer[self._filled : padded] = bytes(padded - self._filled)
            self._send(buffer[:padded])
        for slot in range(len(self._buffers)):
            self._wait(slot)
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)

    def stop(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _send(self, buffer: memoryview) -> None:
        slot = self._num_full % len(self._buffers)
        self._writes[slot] = self._thread.submit(_write_all, self._fd, buffer, self._num_full * self._size)
        self._num_full, self._filled = self._num_full + 1, 0

    def _wait(self, slot: int) -> None:
        pending, self._writes[slot] = self._writes[slot], None
        if pending is not None:
            pending.result()


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


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while len(data):
        try:
            written = os.pwrite(fd, data, offset)
        except OSError as error:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~_DIRECT)  # of a size or alignment that this disk does not take
            continue
        data, offset = data[written:], offset + written
