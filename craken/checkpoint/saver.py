"""Saves a checkpoint: every rank writes its own file, all agree on how it went, rank 0 puts the folder in place.

    every rank   check pieces, encode states          -> gather the entries; all compute who writes what
    rank 0       create .TAG.tmp-TOKEN                -> gather
    every rank   write and fsync rank-K.safetensors   -> gather the checksums
    rank 0       write and fsync index.json, rename, move `latest`, delete what was replaced or is old -> gather

Each arrow is also the point where a failure on any rank becomes the same error on all; until the rename nothing but
the hidden folder has been touched.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from craken.checkpoint import folder as folders
from craken.checkpoint.agreement import do_on_all, run_on_all
from craken.checkpoint.blocks import BLOCK_BYTES
from craken.checkpoint.entry import RANK_STATE, RESERVED_KINDS, SHARED_STATE, Entry, Piece, entry_of
from craken.checkpoint.index import INDEX_NAME, WrittenFile, build_index, index_to_text
from craken.checkpoint.place import Place, place_of
from craken.checkpoint.plan import assign_writers
from craken.checkpoint.recovery_script import leave_script
from craken.checkpoint.remote import StagedUrl
from craken.checkpoint.retention import delete_older
from craken.checkpoint.shard_file import file_name, write_file
from craken.checkpoint.state_codec import encode_state
from craken.comm import MeshAxis
from craken.spec import ShardSpec


class Target(NamedTuple):
    """Where a checkpoint goes, and what follows once it is whole.

    keep_last: delete older checkpoints in `folder` beyond this many, the new one included; None keeps all.
    """

    folder: Place
    tag: str
    save_latest: bool = True
    keep_last: int | None = None

    @property
    def doing(self) -> str:
        return f"saving a checkpoint to {self.folder}"


class Plan(NamedTuple):
    """What one rank brings: its pieces, with states turned into pieces, their entries, and the encoded shared state."""

    pieces: list[Piece]
    entries: list[Entry]
    shared_state: Any


class Agreed(NamedTuple):
    """What all ranks have agreed on before anything is written: who writes which of its entries (`to_write`)."""

    target: Target
    plan: Plan
    entries_by_rank: list[list[Entry]]
    to_write: list[int]


class Staged(NamedTuple):
    """A folder for a checkpoint that is not there yet. staging: rank 0's, whose `path` all ranks know."""

    agreed: Agreed
    staging: folders.Staging | None
    path: Place | StagedUrl


def save(
    folder: str | os.PathLike[str],
    tag: str,
    *,
    pieces: Iterable[Piece],
    axis: MeshAxis,
    rank_state: dict[str, Any],
    shared_state: dict[str, Any],
    save_latest: bool = True,
    keep_last: int | None = None,
) -> Place:
    """Collective over `axis`: save a checkpoint in `folder`/`tag` and return that place once it is on the disk.

    `folder` lies on storage that all ranks share, or is the URL of a store. `rank_state` is kept for each rank,
    `shared_state` is taken from rank 0. The pieces of all ranks together must tile every tensor. A checkpoint that has
    the tag is replaced in one step. `keep_last` deletes older checkpoints in `folder` beyond so many, once the new one
    is there. Raises the same error on all ranks, with the ranks it comes from: ValueError for pieces or states that
    cannot be stored (before anything is written), OSError when a file system refuses; checkpoints there before stay
    intact.
    """
    target = Target(place_of(folder), tag, save_latest, keep_last)
    with record_function(f"craken::checkpoint::save ({tag})"):
        agreed = agree(target, pieces, axis=axis, rank_state=rank_state, shared_state=shared_state)
        with contextlib.ExitStack() as ending:
            staging, paths = run_on_all(lambda: stage(target, axis.rank, ending), axis, doing=target.doing)
            staged = Staged(agreed, staging, paths[0])
            tensors = [agreed.plan.pieces[i].tensor for i in agreed.to_write]
            _, files = run_on_all(lambda: (None, write(staged, tensors, axis.rank)), axis, doing=target.doing)
            do_on_all(lambda: publish(staged, files), axis, doing=target.doing)
    return target.folder / tag


def agree(
    target: Target,
    pieces: Iterable[Piece],
    *,
    axis: MeshAxis,
    rank_state: dict[str, Any],
    shared_state: dict[str, Any],
) -> Agreed:
    """Collective over `axis`: check what all ranks bring and decide who writes what. Errors as `save`'s."""
    plan, announced = run_on_all(
        lambda: _announce(target, make_plan(pieces, rank_state, shared_state, axis.rank)), axis, doing=target.doing
    )
    entries_by_rank = _agreed_entries(announced)
    return Agreed(target, plan, entries_by_rank, assign_writers(entries_by_rank)[axis.rank])


def stage(target: Target, rank: int, ending: contextlib.ExitStack) -> tuple[folders.Staging | None, Place | StagedUrl]:
    """Rank 0: make the folder, to be discarded at `ending`; return it and the path that all ranks are to know."""
    if rank != 0:
        return None, target.folder  # nobody asks this rank
    staging = folders.stage(target.folder, target.tag)
    ending.callback(folders.discard, staging)
    return staging, staging.path


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
    return Piece(kind, ShardSpec.whole(fqn, tensor.shape), tensor)


def write(staged: Staged, tensors: Sequence[torch.Tensor], rank: int) -> WrittenFile:
    """Write this rank's file from `tensors`, one for each entry that it writes, of that entry's bytes."""
    agreed, path = staged.agreed, staged.path
    if isinstance(path, Path) and not path.is_dir():
        raise FileNotFoundError(f"{path}, made by rank 0, is not visible here: save to storage that all ranks share")
    return write_file(path / file_name(rank), [agreed.plan.entries[i] for i in agreed.to_write], tensors)


def publish(staged: Staged, files: Sequence[WrittenFile]) -> Place | None:
    """Rank 0: write the index of all ranks' files, give the folder its name and return it; None on other ranks."""
    agreed, staging, _ = staged
    if staging is None:
        return None
    target = agreed.target
    entries = [entry for entries in agreed.entries_by_rank for entry in entries]
    index = build_index(files, entries, block_bytes=BLOCK_BYTES, shared_state=agreed.plan.shared_state)
    folders.write_durably(staging.path / INDEX_NAME, index_to_text(index))
    if isinstance(target.folder, Path):
        leave_script(target.folder)
    folders.publish(staging)
    if target.save_latest:
        folders.move_latest(target.folder, target.tag)
    if target.keep_last is not None:
        delete_older(target.folder, keep_last=target.keep_last)
    return target.folder / target.tag


def _announce(target: Target, plan: Plan) -> tuple[Plan, tuple[str, list[Entry]]]:
    folders.check_tag(target.tag)
    if target.keep_last is not None and target.keep_last < 1:
        raise ValueError(f"keep_last: expected at least 1 (None keeps all checkpoints), got {target.keep_last}")
    return plan, (target.tag, plan.entries)


def _agreed_entries(announced: list[tuple[str, list[Entry]]]) -> list[list[Entry]]:
    tags = [tag for tag, _ in announced]
    if len(set(tags)) > 1:
        raise ValueError(f"expected one tag on all ranks, got {dict(enumerate(tags))}: pass the same tag everywhere")
    return [entries for _, entries in announced]
