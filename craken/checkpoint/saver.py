"""Saves a checkpoint: every rank writes its own file, all agree on how it went, rank 0 puts the folder in place.

    every rank   check pieces, encode states          -> gather the entries; all compute who writes what
    rank 0       create .TAG.tmp-TOKEN                -> gather
    every rank   write and fsync rank-K.safetensors   -> gather the checksums
    rank 0       write and fsync index.json, rename, move `latest`, delete what was replaced -> gather

Each arrow is also the point where a failure on any rank becomes the same error on all; until the rename nothing but
the hidden folder has been touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from craken.checkpoint import folder as folders
from craken.checkpoint.agreement import run_on_all
from craken.checkpoint.blocks import BLOCK_BYTES
from craken.checkpoint.entry import RANK_STATE, RESERVED_KINDS, SHARED_STATE, Entry, Piece, entry_of
from craken.checkpoint.index import INDEX_NAME, WrittenFile, build_index, index_to_text
from craken.checkpoint.place import Place, place_of
from craken.checkpoint.plan import assign_writers
from craken.checkpoint.remote import StagedUrl
from craken.checkpoint.shard_file import file_name, write_file
from craken.checkpoint.state_codec import encode_state
from craken.comm import MeshAxis
from craken.spec import ShardSpec


class Plan(NamedTuple):
    """What one rank brings: its pieces, with states turned into pieces, their entries, and the encoded shared state."""

    pieces: list[Piece]
    entries: list[Entry]
    shared_state: Any


class Written(NamedTuple):
    """What all ranks wrote, and of what."""

    files: list[WrittenFile]
    entries_by_rank: list[list[Entry]]
    shared_state: Any
    save_latest: bool


def save(
    folder: str | os.PathLike[str],
    tag: str,
    *,
    pieces: Iterable[Piece],
    axis: MeshAxis,
    rank_state: dict[str, Any],
    shared_state: dict[str, Any],
    save_latest: bool = True,
) -> Place:
    """Collective over `axis`: save a checkpoint in `folder`/`tag` and return that place once it is on the disk.

    `folder` lies on storage that all ranks share, or is the URL of a store. `rank_state` is kept for each rank,
    `shared_state` is taken from rank 0. The pieces of all ranks together must tile every tensor. A checkpoint that has
    the tag is replaced in one step. Raises the same error on all ranks, with the ranks it comes from: ValueError for
    pieces or states that cannot be stored (before anything is written), OSError when a file system refuses;
    checkpoints there before stay intact.
    """
    target, doing = place_of(folder), f"saving a checkpoint to {folder}"
    with record_function(f"craken::checkpoint::save ({tag})"):
        plan, announced = run_on_all(
            lambda: _announce(tag, make_plan(pieces, rank_state, shared_state, axis.rank)), axis, doing=doing
        )
        entries_by_rank = _agreed_entries(announced)
        to_write = assign_writers(entries_by_rank)[axis.rank]
        staging, paths = run_on_all(lambda: _stage(target, tag, axis.rank), axis, doing=doing)
        try:
            _, written = run_on_all(lambda: (None, _write(paths[0], plan, to_write, axis.rank)), axis, doing=doing)
            result = Written(written, entries_by_rank, plan.shared_state, save_latest)
            run_on_all(lambda: _publish(staging, target, tag, result), axis, doing=doing)
        finally:
            if staging is not None:
                folders.discard(staging)
    return target / tag


def make_plan(pieces: Iterable[Piece], rank_state: dict[str, Any], shared_state: dict[str, Any], rank: int) -> Plan:
    """Check `rank`'s pieces and encode its states; touches no file. ValueError naming the tensor or the key."""
    checked = list(pieces)
    for piece in checked:
        if piece.kind in RESERVED_KINDS:
            raise ValueError(f"{piece.kind} of {piece.spec.fqn}: the kind {piece.kind!r} is taken, choose another word")
    own = encode_state(rank_state, root=RANK_STATE)
    checked += [_state_piece(RANK_STATE, f"{rank}/{name}", tensor) for name, tensor in own.tensors.items()]
    document = torch.frombuffer(bytearray(json.dumps(own.value, allow_nan=False).encode()), dtype=torch.uint8)
    checked.append(_state_piece(RANK_STATE, str(rank), document))
    shared = None
    if rank == 0:
        shared, tensors = encode_state(shared_state, root=SHARED_STATE)
        checked += [_state_piece(SHARED_STATE, name, tensor) for name, tensor in tensors.items()]
    return Plan(checked, [entry_of(piece) for piece in checked], shared)


def _state_piece(kind: str, fqn: str, tensor: torch.Tensor) -> Piece:
    return Piece(kind, ShardSpec(fqn, tuple(tensor.shape), 0, tensor.numel()), tensor)


def _announce(tag: str, plan: Plan) -> tuple[Plan, tuple[str, list[Entry]]]:
    folders.check_tag(tag)
    return plan, (tag, plan.entries)


def _agreed_entries(announced: list[tuple[str, list[Entry]]]) -> list[list[Entry]]:
    tags = [tag for tag, _ in announced]
    if len(set(tags)) > 1:
        raise ValueError(f"expected one tag on all ranks, got {dict(enumerate(tags))}: pass the same tag everywhere")
    return [entries for _, entries in announced]


def _stage(target: Place, tag: str, rank: int) -> tuple[folders.Staging | None, Place | StagedUrl]:
    if rank != 0:
        return None, target
    staging = folders.stage(target, tag)
    return staging, staging.path


def _write(path: Place | StagedUrl, plan: Plan, to_write: list[int], rank: int) -> WrittenFile:
    if isinstance(path, Path) and not path.is_dir():
        raise FileNotFoundError(f"{path}, made by rank 0, is not visible here: save to storage that all ranks share")
    entries = [plan.entries[i] for i in to_write]
    return write_file(path / file_name(rank), entries, [plan.pieces[i].tensor for i in to_write])


def _publish(staging: folders.Staging | None, target: Place, tag: str, result: Written) -> tuple[None, None]:
    if staging is None:
        return None, None
    entries = [entry for entries in result.entries_by_rank for entry in entries]
    index = build_index(result.files, entries, block_bytes=BLOCK_BYTES, shared_state=result.shared_state)
    folders.write_durably(staging.path / INDEX_NAME, index_to_text(index))
    folders.publish(staging)
    if result.save_latest:
        folders.move_latest(target, tag)
    return None, None
