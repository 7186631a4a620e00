"""Writes one rank's tensors as a safetensors file, from their own memory, with checksums taken in passing.

    | header length, 8 bytes | JSON header, padded with spaces | data, from a multiple of 4096 on |

The data go block by block: hash a block, hand it on while it is in the cache, go on with the next. The disk works
meanwhile (`direct_file`), so that a checkpoint is written as fast as the disk takes it, and pushes nothing out of the
page cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from craken.checkpoint import remote
from craken.checkpoint.blocks import BLOCK_BYTES, checksum_of
from craken.checkpoint.direct_file import new_file
from craken.checkpoint.entry import Entry, bytes_of, dtype_of, in_host_memory, memory_of
from craken.checkpoint.index import FileRecord, PieceRecord, WrittenFile
from craken.checkpoint.place import Place, Url
from craken.disk import round_up

_ALIGNMENT_BYTES = 4096


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
    data_start = round_up(8 + len(text), _ALIGNMENT_BYTES)
    header = (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)
    return FileLayout(header, [data_start + start for start in starts], data_start + end)


Write = Callable[[memoryview], object]  # appends


def write_file(path: Place, entries: Sequence[Entry], tensors: Sequence[Tensor]) -> WrittenFile:
    """Write `tensors` (one an entry) to a new file at `path`, durably; OSError when the disk or the store refuses."""
    if sys.byteorder != "little":
        raise NotImplementedError("checkpoints are little-endian; writing them on this machine is not supported")
    layout = plan_file(entries)
    with _new_remote_file(path) if isinstance(path, Url) else _new_local_file(path, layout.num_bytes) as write:
        write(memoryview(layout.header))
        pieces = []
        for start, i in sorted((start, i) for i, start in enumerate(layout.starts)):
            entry, blocks = entries[i], _write_blocks(write, tensors[i])
            piece = PieceRecord(path.name, start, start + entry.num_bytes, entry.offset, entry.numel, blocks)
            pieces.append((entry, piece))
    checksum = checksum_of(memoryview(layout.header))
    return WrittenFile(FileRecord(path.name, layout.num_bytes, len(layout.header), checksum), pieces)


@contextmanager
def _new_local_file(path: Path, num_bytes: int) -> Iterator[Write]:
    with new_file(path, num_bytes) as file:
        yield file.write


@contextmanager
def _new_remote_file(url: Url) -> Iterator[Write]:
    with remote.writing(url) as stream:
        yield stream.write


def _write_blocks(write: Write, tensor: Tensor) -> tuple[str, ...]:
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
        write(block)
    return tuple(checksums)
