"""The index of a checkpoint: for every tensor, which bytes of which file hold which elements, with checksums.

    {"format": "craken-checkpoint", "version": 1, "checksum": xxh3_128 of the body's text, "body":
      {"world_size": 2, "block_bytes": 8388608,
       "files":   [{"name", "num_bytes", "data_start", "header_checksum"}, ...],
       "tensors": [{"kind", "fqn", "shape", "dtype",
                    "pieces": [{"file", "start", "end", "offset", "numel", "blocks": [xxh3_64, ...]}, ...]}, ...],
       "shared_state": ...}}

A piece lies in bytes [start, end) of its file and holds elements [offset, offset + numel) of the row-major flattened
tensor. It has one checksum for each `block_bytes` of its bytes, so any range can be checked by reading at most one
block more at either end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from craken.checkpoint.entry import Entry, dtype_of
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.place import Place, read_bytes

INDEX_NAME = "index.json"
FORMAT = "craken-checkpoint"
VERSION = 1
_BODY_KEY = ', "body": '


@dataclass(frozen=True)
class PieceRecord:
    """Bytes [start, end) of `file` hold elements [offset, offset + numel); `blocks` are the checksums, in hex."""

    file: str
    start: int
    end: int
    offset: int
    numel: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class TensorRecord:
    """One stored tensor; `pieces` lie in order of their offset and tile it. `dtype` is the safetensors code."""

    kind: str
    fqn: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[PieceRecord, ...]


@dataclass(frozen=True)
class FileRecord:
    """One safetensors file: its size, where its data begin, and the checksum (xxh3_64, hex) of all before them."""

    name: str
    num_bytes: int
    data_start: int
    header_checksum: str


class WrittenFile(NamedTuple):
    """What a rank wrote: the file, and a record for each entry that went into it."""

    file: FileRecord
    pieces: list[tuple[Entry, PieceRecord]]


@dataclass(frozen=True)
class Index:
    """All that is known about a checkpoint without opening its tensor files."""

    world_size: int
    block_bytes: int
    files: tuple[FileRecord, ...]
    tensors: dict[tuple[str, str], TensorRecord]  # by (kind, fqn)
    shared_state: Any  # encoded by state_codec
    checksum: str = field(default="", compare=False)  # of its text, once it has one


def build_index(
    written: Sequence[WrittenFile], entries: Sequence[Entry], *, block_bytes: int, shared_state: Any
) -> Index:
    """Combine what each rank wrote. `entries` names all tensors, those without elements included."""
    pieces: dict[tuple[str, str], list[PieceRecord]] = {(entry.kind, entry.fqn): [] for entry in entries}
    for rank_file in written:
        for entry, piece in rank_file.pieces:
            pieces[entry.kind, entry.fqn].append(piece)
    tensors = {}
    for key, entry in {(entry.kind, entry.fqn): entry for entry in entries}.items():
        in_order = tuple(sorted(pieces[key], key=lambda piece: piece.offset))
        tensors[key] = TensorRecord(entry.kind, entry.fqn, entry.shape, entry.dtype, in_order)
    return Index(len(written), block_bytes, tuple(rank_file.file for rank_file in written), tensors, shared_state)


def index_to_text(index: Index) -> str:
    """Return the text of `index.json`."""
    body = json.dumps(
        {
            "world_size": index.world_size,
            "block_bytes": index.block_bytes,
            "files": [vars(file) for file in index.files],
            "tensors": [_fields_of(tensor) for tensor in index.tensors.values()],
            "shared_state": index.shared_state,
        },
        allow_nan=False,
    )
    head = json.dumps({"format": FORMAT, "version": VERSION, "checksum": _checksum(body)})
    return f"{head[:-1]}{_BODY_KEY}{body}}}\n"


def read_index(folder: Place) -> Index:
    """Read and check `index.json` of a checkpoint folder; CheckpointDamaged or ValueError (newer format) otherwise."""
    path = folder / INDEX_NAME
    try:
        text = read_bytes(path).decode("ascii")
        document = json.loads(text)
        version, checksum, body = int(document["version"]), document["checksum"], document["body"]
        is_ours = document["format"] == FORMAT
    except (ValueError, TypeError, KeyError, FileNotFoundError, NotADirectoryError, RecursionError) as error:
        raise CheckpointDamaged(f"{path} is damaged or is no checkpoint index: {error!r}") from error
    if is_ours and version > VERSION:
        raise ValueError(
            f"{path} has format version {version}, this release reads versions up to {VERSION}: upgrade craken"
        )
    _, _, body_text = text.partition(_BODY_KEY)
    if not is_ours or version != VERSION or checksum != _checksum(body_text[:-2]):
        raise CheckpointDamaged(f"{path} is damaged: its checksum does not fit its text; load another tag")
    try:
        return _index_of(body, checksum)
    except ValueError as error:
        what = str(error)
    except (TypeError, KeyError, AttributeError) as error:
        what = repr(error)
    raise CheckpointDamaged(f"{path} is not a well-formed index of format version {VERSION}: {what}; load another tag")


def _index_of(body: dict[str, Any], checksum: str) -> Index:
    """Return the index, if every byte range lies in its file and every element of every tensor in one of them."""
    world_size, block_bytes, shared_state = body["world_size"], body["block_bytes"], body["shared_state"]
    if not _are_counts(world_size, block_bytes) or not world_size or not block_bytes or type(shared_state) is not dict:
        raise ValueError("expected a positive world_size and block_bytes, and a shared_state that is an object")
    files: dict[str, FileRecord] = {}
    for fields in body["files"]:
        file = FileRecord(**fields)
        _check_file(file, files)
        files[file.name] = file
    tensors: dict[tuple[str, str], TensorRecord] = {}
    for fields in body["tensors"]:
        pieces = tuple(PieceRecord(**{**piece, "blocks": tuple(piece["blocks"])}) for piece in fields["pieces"])
        record = TensorRecord(**{**fields, "shape": tuple(fields["shape"]), "pieces": pieces})
        if (record.kind, record.fqn) in tensors:
            raise ValueError(f"{record.kind} of {record.fqn} is there twice")
        _check_tensor(record, files, block_bytes)
        tensors[record.kind, record.fqn] = record
    return Index(world_size, block_bytes, tuple(files.values()), tensors, shared_state, checksum)


def _check_file(file: FileRecord, others: Container[str]) -> None:
    """A file lies in the checkpoint's own folder, whatever an index from elsewhere says, and is named once."""
    name = file.name
    if type(name) is not str or Path(name).name != name or name in ("", "..") or "\0" in name or name in others:
        raise ValueError(f"expected file names without a folder, each once, got {name!r}")
    if not _are_counts(file.num_bytes, file.data_start) or file.data_start > file.num_bytes:
        raise ValueError(f"{name}: expected data to start within its bytes, got {file.data_start} of {file.num_bytes}")


def _check_tensor(record: TensorRecord, files: Mapping[str, FileRecord], block_bytes: int) -> None:
    name, end = f"{record.kind} of {record.fqn}", 0
    if not (type(record.kind) is type(record.fqn) is str and _are_counts(*record.shape)):
        raise ValueError(f"{name}: expected words for names and counts for the shape {record.shape}")
    itemsize = dtype_of(record.dtype).itemsize
    for piece in record.pieces:
        what = _problem(piece, files, itemsize, block_bytes)
        if what is None and piece.offset != end:
            what = f"begins at element {piece.offset}, expected {end}: elements are missing or there twice"
        if what is not None:
            raise ValueError(f"{piece.file}: the piece of {name} {what}")
        end += piece.numel
    if end != math.prod(record.shape):
        raise ValueError(f"{name}: the pieces hold {end} elements, shape {record.shape} has {math.prod(record.shape)}")


def _problem(piece: PieceRecord, files: Mapping[str, FileRecord], itemsize: int, block_bytes: int) -> str | None:
    """Say what is wrong with a piece by itself; None when nothing is."""
    file, num_bytes = files.get(piece.file), piece.numel * itemsize
    if file is None:
        return "lies in a file that the index does not list"
    if not _are_counts(piece.start, piece.end, piece.offset, piece.numel) or not piece.numel:
        return f"has numbers that are no counts: {piece.start}, {piece.end}, {piece.offset}, {piece.numel}"
    if piece.end - piece.start != num_bytes or piece.start < file.data_start or piece.end > file.num_bytes:
        return (
            f"has bytes [{piece.start}, {piece.end}); expected {num_bytes} between {file.data_start} and "
            f"{file.num_bytes} for its {piece.numel} elements"
        )
    num_blocks = -(-num_bytes // block_bytes)
    if len(piece.blocks) != num_blocks:
        return f"has {len(piece.blocks)} checksums, expected {num_blocks} for {num_bytes} bytes"
    return None


def _are_counts(*numbers: Any) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)


def _fields_of(tensor: TensorRecord) -> dict[str, Any]:
    return {**vars(tensor), "pieces": [vars(piece) for piece in tensor.pieces]}


def _checksum(text: str) -> str:
    return str(xxhash.xxh3_128_hexdigest(text.encode("ascii", "replace")))
