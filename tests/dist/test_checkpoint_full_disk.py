"""A disk that fills at every point of a save: an error on all ranks, the checkpoints before it whole, nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from craken.checkpoint import Reader, list_tags, verify
from tests.dist.topologies import Topology, start, train
from tests.small_disk import mounted

TOPOLOGY = Topology(1, 2)
DISK_BYTES, PAGE_BYTES = 4 << 20, 4096
NUM_ROOMS = 16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    with mounted(tmp_path / "disk", DISK_BYTES) as disk:
        yield disk


class Outcome(NamedTuple):
    """A save with `room_bytes` left on the disk: the error's text ("" for none), what lies there, what `latest` is."""

    room_bytes: int
    error: str
    names: list[str]
    latest: str
    is_whole: bool


def fill(disk: Path, room_bytes: int) -> None:
    """Leave `room_bytes` on the disk."""
    (disk / "ballast").write_bytes(b"")
    state = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(state.f_bavail * state.f_frsize - room_bytes))


def save_into_less_and_less(disk: str, tag: str, in_background: bool) -> list[Outcome]:
    """Save `tag` with ever more room on the disk, from none to enough, taking it away again each time."""
    folder, is_first = Path(disk) / "saved", dist.get_rank() == 0
    engine, found = start(TOPOLOGY, "", checkpoint={"async_save": in_background, "keep_last": 2}), []
    engine.save_checkpoint(str(folder), tag="older")
    train(engine, 1)
    engine.save_checkpoint(str(folder), tag="kept")
    train(engine, 1)
    engine.wait_for_checkpoint()
    num_bytes = sum(path.stat().st_size for path in (folder / "kept").iterdir())
    rooms = [num_bytes * number // (NUM_ROOMS - 4) // PAGE_BYTES * PAGE_BYTES for number in range(NUM_ROOMS)]
    for room_bytes in rooms:
        if is_first:
            fill(Path(disk), room_bytes)
        dist.barrier()
        error = ""
        try:
            engine.save_checkpoint(str(folder), tag=tag)
            engine.wait_for_checkpoint()
        except OSError as caught:
            error = str(caught)
        dist.barrier()
        names, latest = sorted(path.name for path in folder.iterdir()), (folder / "latest").read_text()
        is_whole = all(verify(folder / one) == [] for one in list_tags(folder))
        found.append(Outcome(room_bytes, error, names, latest.strip(), is_whole))
        dist.barrier()
        if is_first and tag != "kept":
            shutil.rmtree(folder / tag, ignore_errors=True)
            (folder / "latest").write_text("kept\n")
    engine.destroy()
    return found


@pytest.mark.parametrize(("tag", "in_background"), [("new", False), ("kept", False), ("new", True)])
def test_a_full_disk_is_one_error_on_all_ranks_and_costs_nothing(
    run_ranks: Any, small_disk: Path, tag: str, in_background: bool
) -> None:
    mine, other = run_ranks(save_into_less_and_less, 2, str(small_disk), tag, in_background)
    assert mine == other
    for outcome in mine:
        assert outcome.is_whole, outcome
        stays = {"kept", "latest", "zero_to_fp32.py", "older"}
        if tag == "new" and not outcome.error:
            stays.remove("older")
        assert stays <= set(outcome.names) <= stays | {tag}, outcome
        assert "No space left on device" in outcome.error or not outcome.error, outcome
        assert outcome.latest == ("kept" if outcome.error else tag), outcome
    failed = [bool(outcome.error) for outcome in mine]
    assert failed == sorted(failed, reverse=True), "a save failed with more room than was enough before"
    assert 3 < sum(failed) < NUM_ROOMS
    kept = Reader(small_disk / "saved", "kept")
    assert kept.shared_state["global_steps"] == (2 if tag == "kept" else 1)
