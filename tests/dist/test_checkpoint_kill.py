"""Ranks killed at chosen points of a save, on a busy machine, time and again in one run: it ends as if never killed.

Each life of the run loads what `latest` names, takes a step and saves it twice, under a new tag and under one that
exists; in the background, it takes a step more meanwhile. One rank kills itself with SIGKILL at a call that touches the
disk: before it, after it, or half-way through a write. Points are drawn from those that a save was seen to pass, every
kind of call alike, with a fixed seed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from craken.checkpoint import Reader, list_tags, verify
from craken.checkpoint import folder as folders
from craken.disk.settings import round_down
from tests.dist.topologies import Topology, start, train
from tests.pool import Pool, RanksFailed, new_pool

TOPOLOGY = Topology(2, 2)
NUM_KILLS, STEPS_AFTER = {"at once": 20, "in the background": 8}, 2
REPLACED = "pytorch_model"
CALLS = ("pwritev", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "exchange")


class Point(NamedTuple):
    """The `number`-th call of a kind that `rank` makes while it saves, and when the rank dies there."""

    rank: int
    call: str
    number: int
    when: Literal["before", "half-way", "after"]


@contextlib.contextmanager
def watched(seen: Callable[[str], Literal["before", "half-way", "after"] | None]) -> Iterator[None]:
    """Tell `seen` of each call that touches the disk; die where it says so."""

    def wrapped(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            when = seen(name)
            if when == "half-way" and name == "pwritev":
                (data,) = args[1]
                real(args[0], [data[: round_down(len(data) // 2)]], args[2])
            if when in ("before", "half-way"):
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **options)
            if when == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name in CALLS[:-1]:
            stack.enter_context(mock.patch.object(os, name, wrapped(name, getattr(os, name))))
        if folders._renameat2 is not None:
            stack.enter_context(mock.patch.object(folders, "_renameat2", wrapped("exchange", folders._renameat2)))
        yield


@contextlib.contextmanager
def busy(folder: str) -> Iterator[None]:
    """Keep the processor and the disk busy with other things."""
    ended, square = threading.Event(), torch.ones(200, 200)

    def compute() -> None:
        while not ended.is_set():
            torch.mm(square, square)

    def write() -> None:
        with open(Path(folder) / f"other-{os.getpid()}", "wb") as file:
            while not ended.wait(0.001):
                file.seek(0)
                file.write(bytes(1 << 18))
                file.flush()
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    threads = [threading.Thread(target=work, daemon=True) for work in (compute, write)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def one_life(folder: str, noise: str, how: str, point: Point | None) -> list[str]:
    """Resume, take a step, save it under two tags; return the calls made meanwhile by this rank."""
    calls: list[str] = []

    def seen(name: str) -> Any:
        calls.append(name)
        here = dist.get_rank(), name, calls.count(name) - 1
        return point.when if point is not None and point[:3] == here else None

    engine = start(TOPOLOGY, folder, checkpoint={"async_save": how == "in the background"})
    engine.load_checkpoint(folder)
    train(engine, 1)
    with busy(noise), watched(seen):
        engine.save_checkpoint(folder)
        engine.save_checkpoint(folder, tag=REPLACED)
        if how == "in the background":
            train(engine, 1)
        engine.wait_for_checkpoint()
    engine.destroy()
    return calls


def last_life(folder: str) -> tuple[int, list[float]]:
    """Resume and return the steps that had been saved, and the losses that follow."""
    engine = start(TOPOLOGY, folder)
    engine.load_checkpoint(folder)
    found = engine.global_steps, train(engine, STEPS_AFTER)
    engine.destroy()
    return found


def uninterrupted(num_steps: int) -> list[float]:
    engine = start(TOPOLOGY, "")
    losses = train(engine, num_steps)
    engine.destroy()
    return losses


def step_of_whole_folder(folder: Path) -> int:
    """Check every checkpoint there is, byte by byte; return the step that `latest` leads to."""
    steps = {}
    for tag in list_tags(folder):
        reader = Reader(folder, tag)
        assert verify(reader.path) == [], tag
        steps[tag] = reader.shared_state["global_steps"]
        assert tag in (REPLACED, f"global_step{steps[tag]}")
    assert steps
    return int(steps[Reader(folder).tag])


def chosen_points(calls_by_rank: list[list[str]], num_kills: int) -> list[Point]:
    """Draw points, each kind of call in turn, so that renames count as much as the many writes."""
    chosen, points = random.Random(11), []
    kinds = [(rank, name) for name in CALLS for rank, calls in enumerate(calls_by_rank) if name in calls]
    for rank, name in itertools.islice(itertools.cycle(kinds), num_kills):
        number = chosen.randrange(calls_by_rank[rank].count(name))
        moments = ("before", "half-way", "after") if name == "pwritev" else ("before", "after")
        points.append(Point(rank, name, number, chosen.choice(moments)))  # type: ignore[arg-type]
    return points


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Ranks of our own: each death takes them all down."""
    pool = new_pool()
    yield pool
    pool.stop()


@pytest.mark.parametrize("how", NUM_KILLS)
def test_kills_in_the_middle_of_a_save_lose_no_checkpoint(pool: Pool, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "saved"
    pool.run(one_life, 2, (str(folder), str(tmp_path), how, None))
    calls_by_rank = pool.run(one_life, 2, (str(folder), str(tmp_path), how, None))
    points, step = chosen_points(calls_by_rank, NUM_KILLS[how]), step_of_whole_folder(folder)
    assert {point.call for point in points} >= {"pwritev", "fsync", "rename", "replace"}
    for point in points:
        with pytest.raises(RanksFailed, match="SIGKILL"):
            pool.run(one_life, 2, (str(folder), str(tmp_path), how, point))
        before, step = step, step_of_whole_folder(folder)
        assert step in (before, before + 1), point
    assert step > 3, "no save got through"
    steps, losses = pool.run(last_life, 2, (str(folder),))[0]
    assert steps == step
    assert losses == pool.run(uninterrupted, 2, (step + STEPS_AFTER,))[0][step:]
    pool.run(one_life, 2, (str(folder), str(tmp_path), how, None))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
