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
from collections.abc import Sequence
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
    for entry in entries:
        key = entry.kind, entry.fqn
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
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointDamaged(f"{path} is not a well-formed index of format version {VERSION}: {error!r}") from error


def _index_of(body: dict[str, Any], checksum: str) -> Index:
    tensors = {}
    for fields in body["tensors"]:
        pieces = tuple(
            PieceRecord(**{**piece, "file": _plain_name(piece["file"]), "blocks": tuple(piece["blocks"])})
            for piece in fields["pieces"]
        )
        dtype_of(fields["dtype"])
        record = TensorRecord(**{**fields, "shape": tuple(fields["shape"]), "pieces": pieces})
        tensors[record.kind, record.fqn] = record
    files = tuple(FileRecord(**{**fields, "name": _plain_name(fields["name"])}) for fields in body["files"])
    return Index(int(body["world_size"]), int(body["block_bytes"]), files, tensors, body["shared_state"], checksum)


def _fields_of(tensor: TensorRecord) -> dict[str, Any]:
    return {**vars(tensor), "pieces": [vars(piece) for piece in tensor.pieces]}


def _plain_name(name: str) -> str:
    """A file lies in the checkpoint's own folder, whatever an index from elsewhere says."""
    if Path(name).name != name:
        raise ValueError(f"expected a file name without a folder, got {name!r}")
    return name


def _checksum(text: str) -> str:
    return str(xxhash.xxh3_128_hexdigest(text.encode("ascii", "replace")))
