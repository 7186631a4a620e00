"""Checkpoints saved and read by real ranks."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from craken.checkpoint import Piece, Reader, save, verify
from craken.comm import MeshAxis, world_axis
from craken.spec import ShardSpec

NUMEL = 5 << 20  # 20 MiB: three blocks


def full(step: float) -> torch.Tensor:
    return torch.arange(NUMEL, dtype=torch.float32) + step


def save_my_shard(folder: Path, step: float, axis: MeshAxis) -> Path:
    low, high = NUMEL * axis.rank // axis.size, NUMEL * (axis.rank + 1) // axis.size
    shard = Piece("master", ShardSpec("w", (NUMEL,), low, high - low), full(step)[low:high])
    replica = Piece("param", ShardSpec("b", (3,), 0, 3), torch.tensor([1.0, 2.0, step]))
    rng = torch.get_rng_state()
    return save(
        folder,
        "global_step",
        pieces=[shard, replica],
        axis=axis,
        rank_state={"rank": axis.rank, "rng": rng},
        shared_state={"step": step},
    )


def save_on_rank(folder: Path, step: float) -> Path:
    return save_my_shard(folder, step, world_axis())


def read_on_rank(folder: Path) -> tuple[bool, Any, list[Any]]:
    axis, reader = world_axis(), Reader(folder)
    low, high = NUMEL * axis.rank // axis.size, NUMEL * (axis.rank + 1) // axis.size
    out = torch.empty(high - low)
    reader.read("master", ShardSpec("w", (NUMEL,), low, high - low), out)
    is_same = torch.equal(out, full(reader.shared_state["step"])[low:high])
    return is_same, reader.shared_state, [reader.rank_state(rank)["rank"] for rank in range(reader.world_size)]


def save_with_a_full_disk_on_rank_one(folder: Path) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world_axis().rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        save_on_rank(folder, 2.0)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return "no error"


def save_until_rank_one_dies(folder: Path) -> None:
    axis = world_axis()
    if axis.rank == 1:
        os.kill(os.getpid(), 9)
    save_my_shard(folder, 2.0, axis)


def test_saved_by_four_ranks_and_read_by_two(run_ranks: Any, tmp_path: Path) -> None:
    paths = run_ranks(save_on_rank, 4, tmp_path, 1.0)
    assert paths == [tmp_path / "global_step"] * 4
    assert verify(paths[0]) == []
    assert run_ranks(read_on_rank, 2, tmp_path) == [(True, {"step": 1.0}, [0, 1, 2, 3])] * 2


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_previous(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(save_on_rank, 2, tmp_path, 1.0)
    first, second = run_ranks(save_with_a_full_disk_on_rank_one, 2, tmp_path)
    assert first == second
    assert "failed on 1 of 2 ranks: rank 1: OSError: [Errno 27] File too large" in first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step", "latest", "zero_to_fp32.py"]
    assert run_ranks(read_on_rank, 2, tmp_path) == [(True, {"step": 1.0}, [0, 1])] * 2


def test_a_rank_that_dies_leaves_the_previous(run_ranks: Any, tmp_path: Path) -> None:
    run_ranks(save_on_rank, 2, tmp_path, 1.0)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(save_until_rank_one_dies, 2, tmp_path)
    assert run_ranks(read_on_rank, 2, tmp_path) == [(True, {"step": 1.0}, [0, 1])] * 2
    run_ranks(save_on_rank, 2, tmp_path, 3.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step", "latest", "zero_to_fp32.py"]
