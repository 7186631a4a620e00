"""A saver killed at any moment leaves a checkpoint that loads."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from craken.checkpoint import Reader, list_tags, verify
from craken.checkpoint import folder as folders
from tests.unit.checkpoint.ranks import save_one

_NUM_KILLS = 10  # for each way of replacing


def save_for_ever(folder: Path, way: str, ready: object) -> None:
    """Save again and again: mostly under one tag, now and then under another."""
    torch.set_num_threads(1)
    if way == "renames":
        folders._renameat2 = None
    ready.set()  # type: ignore[attr-defined]
    for step in range(1, 100_000):
        tag = f"global_step{step % 10}" if step % 3 == 0 else "pytorch_model"
        tensors = {f"w{i}": torch.full((200_000,), float(step)) for i in range(4)}
        save_one(folder, tag, tensors, shared_state={"step": step})


def step_after_check(folder: Path) -> int:
    """Check every tag, and `latest`; return the step that `latest` leads to, 0 before the first."""
    for tag in list_tags(folder):
        reader = Reader(folder, tag)
        assert verify(reader.path) == []
        step = reader.shared_state["step"]
        assert all(reader.read_full("param", fqn).eq(step).all() for fqn in reader.names("param"))
    return int(Reader(folder).shared_state["step"]) if (folder / "latest").exists() else 0


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_saver_killed_at_random_moments_always_leaves_checkpoints_that_load(tmp_path: Path, way: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "craken.checkpoint"])
    chosen, steps = random.Random(way), []
    for _ in range(_NUM_KILLS):
        ready = context.Event()
        saver = context.Process(target=save_for_ever, args=(tmp_path, way, ready))
        saver.start()
        assert ready.wait(30)
        time.sleep(chosen.uniform(0.0, 0.12))
        saver.kill()
        saver.join()
        steps.append(step_after_check(tmp_path))
        assert steps[-1] > 0 or not any(steps)
    assert max(steps) > 1
    save_one(tmp_path, "last", {"w": torch.ones(1)})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
