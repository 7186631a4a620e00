"""Writes one rank's tensors as a safetensors file, from their own memory, with checksums taken in passing.

    | header length, 8 bytes | JSON header, padded with spaces | data, from a multiple of 4096 on |

The data go block by block: hash a block, write it while it is in the cache, ask the kernel to start moving it to
the disk (`sync_file_range`), go on with the next. The disk so works while the next block is hashed and copied. What has
arrived there is dropped from the page cache, so that a checkpoint pushes nothing else out and its pages are used again:
1.2-1.5 GB/s into fresh memory where keeping them has 0.5-0.75 and write-then-fsync 0.3, checksums included.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from craken.checkpoint import remote
from craken.checkpoint.blocks import BLOCK_BYTES, checksum_of
from craken.checkpoint.entry import Entry, bytes_of, dtype_of, in_host_memory, memory_of
from craken.checkpoint.index import FileRecord, PieceRecord, WrittenFile
from craken.checkpoint.place import Place, Url

_ALIGNMENT_BYTES = 4096
_NUM_WINDOWS = 8  # of at least BLOCK_BYTES each
_SYNC_START, _SYNC_FINISH = 2, 7  # linux/fs.h: SYNC_FILE_RANGE_WRITE; that with WAIT_BEFORE and WAIT_AFTER


class FileLayout(NamedTuple):
    """Where things lie in a file: the padded header, and the first byte of each entry in the file."""

    header: bytes
    starts: list[int]
    num_bytes: int


def file_name(rank: int) -> str:
    """Return the name of `rank`'s file within a checkpoint folder."""
    return f"rank-{rank:05d}.safetensors"


def plan_file(entries: Sequence[Entry]) -> FileLayout:
    """Lay entries out end to end, wide elements first so that each is aligned to its own size."""
    order = sorted(range(len(entries)), key=lambda i: -dtype_of(entries[i].dtype).itemsize)
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = [0] * len(entries), 0
    for i in order:
        entry = entries[i]
        starts[i], end = end, end + entry.num_bytes
        shape = list(entry.shape) if entry.is_whole else [entry.numel]
        fields[entry.stored_name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [starts[i], end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    data_start = -(-(8 + len(text)) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    header = (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)
    return FileLayout(header, [data_start + start for start in starts], data_start + end)


Write = Callable[[memoryview, int], None]  # data, and the offset in the file, which only grows


def write_file(path: Place, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> WrittenFile:
    """Write `tensors` (one an entry) to a new file at `path`, durably; OSError when the disk or the store refuses."""
    if sys.byteorder != "little":
        raise NotImplementedError("checkpoints are little-endian; writing them on this machine is not supported")
    layout = plan_file(entries)
    with _new_remote_file(path) if isinstance(path, Url) else _new_file(path) as write:
        write(memoryview(layout.header), 0)
        pieces = []
        for start, i in sorted((start, i) for i, start in enumerate(layout.starts)):
            entry, blocks = entries[i], _write_blocks(write, tensors[i], start)
            piece = PieceRecord(path.name, start, start + entry.num_bytes, entry.offset, entry.numel, blocks)
            pieces.append((entry, piece))
    checksum = checksum_of(memoryview(layout.header))
    return WrittenFile(FileRecord(path.name, layout.num_bytes, len(layout.header), checksum), pieces)


@contextmanager
def _new_file(path: Path) -> Iterator[Write]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    writeback = _Writeback(fd)

    def write(data: memoryview, offset: int) -> None:
        end = offset + len(data)
        while len(data):
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written
        writeback.advance(end)

    try:
        yield write
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _new_remote_file(url: Url) -> Iterator[Write]:
    with remote.writing(url) as stream:
        yield lambda data, _: stream.write(data)


def _write_blocks(write: Write, tensor: Tensor, start: int) -> tuple[str, ...]:
    data = bytes_of(tensor)  # [num_bytes]
    is_host = in_host_memory(data)
    staging = data if is_host else torch.empty(min(BLOCK_BYTES, data.numel()), dtype=torch.uint8)
    memory, checksums = memory_of(staging), []
    for low in range(0, data.numel(), BLOCK_BYTES):
        high = min(low + BLOCK_BYTES, data.numel())
        if is_host:
            block = memory[low:high]
        else:
            staging[: high - low].copy_(data[low:high])
            block = memory[: high - low]
        checksums.append(checksum_of(block))
        write(block, start + low)
    return tuple(checksums)


class _Writeback:
    """Keeps the disk busy behind the writer and the page cache small.

    Starts the write-back of each window as soon as it is full; waits for the one `_NUM_WINDOWS` before it and drops
    that from the page cache, whose pages are then used again. Hints only: the fsync at the end is what counts, so
    systems without the call lose speed and nothing else.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._windows = deque([(0, 0)])  # [begin, end) of each one on its way, the newest last

    def advance(self, end: int) -> None:
        """Say that all bytes before `end` have been written."""
        begin = self._windows[-1][1]
        if _sync_file_range is None or end - begin < BLOCK_BYTES:
            return
        self._sync(begin, end, _SYNC_START)
        self._windows.append((begin, end))
        if len(self._windows) > _NUM_WINDOWS:
            begin, end = self._windows.popleft()
            self._sync(begin, end, _SYNC_FINISH)
            os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _sync(self, begin: int, end: int, flags: int) -> None:
        assert _sync_file_range is not None
        if end > begin:  # to the kernel a length of 0 means the whole file
            _sync_file_range(self._fd, ctypes.c_int64(begin), ctypes.c_int64(end - begin), ctypes.c_uint(flags))


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
