"""Ranks as threads of one process, and states to save with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from craken.checkpoint import Piece, save
from craken.comm import MeshAxis
from craken.spec import ShardSpec

ONE_RANK = MeshAxis("dp", None, 0, 1)


def shard(kind: str, fqn: str, full: Tensor, low: int, high: int) -> Piece:
    """Elements [low, high) of the flattened `full`."""
    return Piece(kind, ShardSpec(fqn, tuple(full.shape), low, high - low), full.reshape(-1)[low:high])


def whole(kind: str, fqn: str, full: Tensor) -> Piece:
    return shard(kind, fqn, full, 0, full.numel())


@dataclass
class Brought:
    """What one rank hands to `save`."""

    pieces: list[Piece] = field(default_factory=list)
    rank_state: dict[str, Any] = field(default_factory=dict)
    shared_state: dict[str, Any] = field(default_factory=dict)
    tag: str | None = None


def save_one(folder: Path, tag: str, tensors: dict[str, Tensor], **options: Any) -> Path:
    """Save whole tensors as kind "param" on one rank."""
    states = {"rank_state": {}, "shared_state": {}} | options
    return save(folder, tag, pieces=[whole("param", k, v) for k, v in tensors.items()], axis=ONE_RANK, **states)


def save_on_ranks(folder: Path, tag: str, brought: list[Brought], **options: Any) -> list[Any]:
    """Save on as many ranks as there are items; return each rank's result or exception."""

    def on_rank(rank: int) -> Path:
        mine = brought[rank]
        axis = MeshAxis("dp", None, rank, len(brought))
        states = {"rank_state": mine.rank_state, "shared_state": mine.shared_state}
        return save(folder, mine.tag or tag, pieces=mine.pieces, axis=axis, **states, **options)

    return run_ranks_as_threads(on_rank, len(brought))


def run_ranks_as_threads(on_rank: Callable[[int], Any], num_ranks: int) -> list[Any]:
    def guarded(rank: int) -> Any:
        try:
            return on_rank(rank)
        except (ValueError, OSError, RuntimeError) as error:
            return error

    with gathering_threads(num_ranks), ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(guarded, range(num_ranks)))


@contextmanager
def gathering_threads(num_ranks: int):
    """Let the gathers of the checkpoint room go between threads; a rank that stays away fails the test in 20 s."""
    box: list[Any] = [None] * num_ranks
    barrier = threading.Barrier(num_ranks)

    def gather(obj: Any, axis: MeshAxis) -> list[Any]:
        box[axis.rank] = obj
        barrier.wait(20)
        gathered = list(box)
        barrier.wait(20)
        return gathered

    with patch("craken.checkpoint.agreement.gather_objects", gather):
        yield


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file in place."""
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
