"""Moves one piece between memory and a file, in the calling thread."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch

from craken.disk.pieces import Piece, cut
from craken.disk.settings import ALIGNMENT_BYTES, round_down, round_up

_BLOCK_BYTES = 1 << 20  # of a thread's aligned block
_of_this_thread = threading.local()


class OpenFile:
    """A file descriptor that is closed when nobody refers to it: requests in flight do, so its number is not reused."""

    def __init__(self, fd: int, *, is_direct: bool) -> None:
        self.fd = fd
        self.is_direct = is_direct
        self.ragged = threading.Lock()  # held while a page is read, changed and written back
        weakref.finalize(self, os.close, fd)


class _Window(NamedTuple):
    """An aligned range of the file, what of it belongs to the piece, and where that lies in the piece's memory."""

    low: int
    num_bytes: int
    inner: slice
    outer: slice


def read_direct(fd: int, memory: memoryview, offset: int) -> None:
    """Fill `memory` from a file that is open for direct I/O, whatever the alignment of either.

    OSError (EINVAL) where the disk wants a larger one than pages, or the file ends early.
    """
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    pieces = [Piece(offset, len(memory), False)]  # in one go, ragged ends and all
    if (address - offset) % ALIGNMENT_BYTES == 0:
        pieces = cut(offset, len(memory), address, round_up(len(memory)))
    for piece in pieces:
        _read_piece(fd, piece, memory[piece.offset - offset :][: piece.num_bytes])


def read_piece(file: OpenFile, piece: Piece, memory: memoryview) -> None:
    """Fill `memory` ([piece.num_bytes]) from the file."""
    _read_piece(file.fd, piece, memory)


def _read_piece(fd: int, piece: Piece, memory: memoryview) -> None:
    if piece.is_direct:
        _read_all(fd, memory, piece.offset)
        return
    for window in _windows(piece):
        block = _aligned_block(window.num_bytes)
        _read_all(fd, block, window.low, window.inner.stop)  # the file may end within the window
        memory[window.outer] = block[window.inner]


def write_piece(file: OpenFile, piece: Piece, memory: memoryview) -> None:
    """Write `memory` ([piece.num_bytes]) to the file; what else its pages hold is kept."""
    if piece.is_direct:
        write_all(file.fd, memory, piece.offset)
        return
    for window in _windows(piece):
        block, part = _aligned_block(window.num_bytes), memory[window.outer]
        if len(part) == window.num_bytes:
            block[:] = part
            write_all(file.fd, block, window.low)
            continue
        with file.ragged:  # the end of another request may lie in the same page
            _read_all(file.fd, block, window.low)
            block[window.inner] = part
            write_all(file.fd, block, window.low)


def _windows(piece: Piece) -> Iterator[_Window]:
    end = piece.offset + piece.num_bytes
    for low in range(round_down(piece.offset), round_up(end), _BLOCK_BYTES):
        high = min(low + _BLOCK_BYTES, round_up(end))
        begin, stop = max(low, piece.offset), min(high, end)
        yield _Window(low, high - low, slice(begin - low, stop - low), slice(begin - piece.offset, stop - piece.offset))


def _aligned_block(num_bytes: int) -> memoryview:
    if not hasattr(_of_this_thread, "block"):
        _of_this_thread.block = mmap.mmap(-1, _BLOCK_BYTES)
    return memoryview(_of_this_thread.block)[:num_bytes]


def _read_all(fd: int, memory: memoryview, offset: int, num_bytes: int | None = None) -> None:
    """Fill the first `num_bytes` of `memory`, by default all."""
    end = offset + (len(memory) if num_bytes is None else num_bytes)
    while offset < end:
        got = os.preadv(fd, [memory], offset)
        if got == 0:
            raise OSError(errno.EIO, f"the file ends after {offset} bytes, {end - offset} short")
        memory, offset = memory[got:], offset + got


def write_all(fd: int, memory: memoryview, offset: int) -> None:
    """Write `memory` to a file at `offset`, however little of it the system takes at a time."""
    while len(memory):
        num_bytes = os.pwritev(fd, [memory], offset)
        memory, offset = memory[num_bytes:], offset + num_bytes
