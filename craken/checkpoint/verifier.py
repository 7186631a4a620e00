"""Checks a whole checkpoint folder: every file, every header, every block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from craken.checkpoint.blocks import at_once, begin_block, checksum_of, size_problem
from craken.checkpoint.entry import dtype_of, memory_of
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.folder import no_folder
from craken.checkpoint.index import INDEX_NAME, FileRecord, Index, TensorRecord, read_index
from craken.checkpoint.place import Place, is_file, open_file, place_of, reading_ahead
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
    folder = place_of(path)
    if isinstance(folder, Path) and not folder.is_dir():
        raise FileNotFoundError(no_folder(folder))
    try:
        index = read_index(folder)
    except CheckpointDamaged as error:
        return [Damage(INDEX_NAME, None, str(error))]
    damage: list[Damage] = []
    parts, folder = _parts_by_file(index), reading_ahead(folder, len(index.files))
    for file in index.files:
        damage += _file_damage(folder, file)
        if is_file(folder / file.name):
            damage += _block_damage(folder, file, parts[file.name], index.block_bytes)
    return damage


def _parts_by_file(index: Index) -> dict[str, list[TensorRecord]]:
    """Return, for each file, the pieces that lie in it, each as a record of its own."""
    parts: dict[str, list[TensorRecord]] = {file.name: [] for file in index.files}
    for record in index.tensors.values():
        for piece in record.pieces:
            parts[piece.file].append(replace(record, pieces=(piece,)))
    return parts


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


def _block_damage(folder: Place, file: FileRecord, parts: list[TensorRecord], block_bytes: int) -> Iterator[Damage]:
    scratch = memory_of(torch.empty(min(block_bytes, file.num_bytes), dtype=torch.uint8, device="cpu"))
    with closing(open_file(folder / file.name)) as stream:
        for part in sorted(parts, key=lambda part: part.pieces[0].start):
            piece, itemsize = part.pieces[0], dtype_of(part.dtype).itemsize
            for read in plan_reads(part, piece.offset, piece.numel, itemsize=itemsize, block_bytes=block_bytes):
                try:
                    begin_block(folder, stream, read, scratch[: read.num_bytes], part, at_once).check()
                except CheckpointDamaged as error:
                    yield Damage(read.file, f"{part.kind} of {part.fqn}", str(error))
