"""Checks a whole checkpoint folder: every file, every header, every block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from craken.checkpoint.blocks import at_once, begin_block, checksum_of, size_problem
from craken.checkpoint.entry import dtype_of, memory_of
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.index import INDEX_NAME, FileRecord, Index, TensorRecord, read_index
from craken.checkpoint.place import OpenFile, Place, is_file, open_file, place_of, reading_ahead
from craken.checkpoint.read_plan import plan_reads


class Damage(NamedTuple):
    """One thing that is wrong: the file, the tensor it hits ("kind of fqn"; None: no single one), and what."""

    file: str
    tensor: str | None
    reason: str


def verify(path: str | os.PathLike[str]) -> list[Damage]:
    """Read every byte of the checkpoint folder `path` (SAVE_DIR/TAG) and return all damage found; none is good.

    Holds one block in memory. FileNotFoundError when there is no such folder; ValueError for a newer format.
    """
    folder = reading_ahead(place_of(path))
    if isinstance(folder, Path) and not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist")
    try:
        index = read_index(folder)
    except CheckpointDamaged as error:
        return [Damage(INDEX_NAME, None, str(error))]
    damage: list[Damage] = []
    for file in index.files:
        damage += _file_damage(folder, file)
        if is_file(folder / file.name):
            damage += _block_damage(folder, file, index)
    return damage


def _file_damage(folder: Place, file: FileRecord) -> Iterator[Damage]:
    problem = size_problem(folder, file)
    if problem is not None:
        yield Damage(file.name, None, f"{folder / file.name} {problem}")
    if problem != "is missing":
        header = memoryview(bytearray(file.data_start))
        with closing(open_file(folder / file.name)) as stream:
            stream.read_into(header, 0)
        if checksum_of(header) != file.header_checksum:
            yield Damage(file.name, None, f"{folder / file.name}: the safetensors header is damaged")


def _block_damage(folder: Place, file: FileRecord, index: Index) -> Iterator[Damage]:
    scratch = memory_of(torch.empty(min(index.block_bytes, file.num_bytes), dtype=torch.uint8, device="cpu"))
    with closing(open_file(folder / file.name)) as stream:
        for record in index.tensors.values():
            yield from _tensor_damage(folder, stream, _part_in(file, record), scratch, index.block_bytes)


def _part_in(file: FileRecord, record: TensorRecord) -> list[TensorRecord]:
    """Return those pieces of a tensor that lie in `file`, each as a record of its own."""
    pieces = [piece for piece in record.pieces if piece.file == file.name]
    return [TensorRecord(record.kind, record.fqn, record.shape, record.dtype, (piece,)) for piece in pieces]


def _tensor_damage(
    folder: Place, stream: OpenFile, parts: list[TensorRecord], scratch: memoryview, block_bytes: int
) -> Iterator[Damage]:
    for part in parts:
        piece, itemsize = part.pieces[0], dtype_of(part.dtype).itemsize
        for read in plan_reads(part, piece.offset, piece.numel, itemsize=itemsize, block_bytes=block_bytes):
            try:
                begin_block(folder, stream, read, scratch[: read.num_bytes], part, at_once).check()
            except CheckpointDamaged as error:
                yield Damage(read.file, f"{part.kind} of {part.fqn}", str(error))
