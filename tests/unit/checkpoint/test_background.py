"""Saving in the background on one rank: what is copied, what is kept, what is raised when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from craken.checkpoint import BackgroundSaver, Reader, Target, background, newest_first, verify
from craken.comm import MeshAxis
from tests.unit.checkpoint.ranks import ONE_RANK, names, run_ranks_as_threads, shard, whole


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No write begins before it is set."""
    gate, real = threading.Event(), background.write

    def write(*args: Any) -> Any:
        assert gate.wait(20)
        return real(*args)

    monkeypatch.setattr(background, "write", write)
    yield gate
    gate.set()


def begin(saver: BackgroundSaver, target: Target, *tensors: torch.Tensor, **states: Any) -> Path:
    pieces = [whole("param", f"w{i}", tensor) for i, tensor in enumerate(tensors)]
    others = {"rank_state": {}, "shared_state": {}, "since_s": time.perf_counter()}
    return saver.save(target, pieces, axis=ONE_RANK, **{**others, **states})


def test_what_is_saved_is_what_was_there_at_the_call(tmp_path: Path, gate: threading.Event) -> None:
    saver, client = BackgroundSaver(), {"t": torch.ones(3), "list": [1]}
    tensors = [torch.ones(5), torch.arange(7), torch.zeros((), dtype=torch.bfloat16), torch.empty(0)]
    expected = [tensor.clone() for tensor in tensors]
    path = begin(saver, Target(tmp_path, "a"), *tensors, shared_state=client, rank_state={"rng": torch.ones(2)})
    for tensor in [*tensors, client["t"]]:
        tensor.fill_(9)
    client["list"].append(2)
    assert saver.is_writing
    gate.set()
    saver.wait()
    assert not saver.is_writing
    reader = Reader(tmp_path)
    assert all(torch.equal(reader.read_full("param", f"w{i}"), tensor) for i, tensor in enumerate(expected))
    assert reader.shared_state["t"].tolist() == [1, 1, 1]
    assert reader.shared_state["list"] == [1]
    assert reader.rank_state(0)["rng"].tolist() == [1, 1]
    assert verify(path) == []


def test_the_copy_is_made_in_the_same_memory_each_time(tmp_path: Path) -> None:
    saver, places = BackgroundSaver(), []
    for step, numel in enumerate((1000, 1000, 500, 300_000, 1000)):
        begin(saver, Target(tmp_path, f"step{step}", keep_last=2), torch.full((numel,), float(step)))
        assert saver.stall is not None
        assert saver.stall.num_bytes >= 4 * numel
        places.append(saver._memory.data_ptr())
    saver.wait()
    assert len(set(places[:3])) == len(set(places[3:])) == 1
    assert newest_first(tmp_path) == ["step4", "step3"]
    assert Reader(tmp_path, "step3").read_full("param", "w0").eq(3).all()
    assert Reader(tmp_path, "step4").read_full("param", "w0").eq(4).all()


def test_the_stall_counts_from_where_training_stopped(tmp_path: Path) -> None:
    saver = BackgroundSaver()
    begin(saver, Target(tmp_path, "a"), torch.ones(3), since_s=time.perf_counter() - 100)
    saver.wait()
    assert saver.stall is not None
    assert saver.stall.seconds >= 100 > saver.stall.copy_s + saver.stall.waited_s


def test_a_failure_is_raised_once_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    saver = BackgroundSaver()
    begin(saver, Target(tmp_path, "a"), torch.ones(3))
    saver.wait()
    monkeypatch.setattr(background, "write", full)
    begin(saver, Target(tmp_path, "b"), torch.ones(3))
    with pytest.raises(OSError, match="failed on 1 of 1 ranks: rank 0: OSError.*No space left"):
        saver.wait()
    saver.wait()
    begin(saver, Target(tmp_path, "b"), torch.ones(3))
    with pytest.raises(OSError, match="No space left"):
        begin(saver, Target(tmp_path, "c"), torch.ones(3))
    assert names(tmp_path) == ["a", "latest"]
    monkeypatch.undo()
    begin(saver, Target(tmp_path, "c"), torch.ones(3))
    saver.wait()
    assert Reader(tmp_path).tag == "c"


def test_what_cannot_be_stored_is_raised_at_the_call(tmp_path: Path) -> None:
    saver = BackgroundSaver()
    with pytest.raises(ValueError, match=r"shared_state\.x: cannot store"):
        begin(saver, Target(tmp_path / "f", "a"), shared_state={"x": object()})
    assert not (tmp_path / "f").exists()
    assert not saver.is_writing


def test_without_room_for_the_copy_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(num_bytes: int, **_: Any) -> torch.Tensor:
        raise MemoryError(f"{num_bytes} bytes")

    monkeypatch.setattr(background, "pages", too_much)
    saver = BackgroundSaver()
    with pytest.raises(RuntimeError, match="failed on 1 of 1 ranks: rank 0: MemoryError"):
        begin(saver, Target(tmp_path, "a"), torch.ones(3))
    assert names(tmp_path) == []
    assert not saver.is_writing


def test_ranks_that_lost_each_other_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's letter never comes: rank 0 gives up, deletes the folder and tells the others."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr("craken.comm.mailbox._store_of", lambda _: store)
    monkeypatch.setattr(background, "PATIENCE_S", 0.3)
    monkeypatch.setattr(background, "_PATIENCE_RATIO", 0)
    monkeypatch.setattr(background, "_FAREWELL_S", 0.1)
    real = background.write

    def write(prepared: Any, tensors: Any, rank: int) -> Any:
        return real(prepared, tensors, rank) if rank == 0 else threading.Event().wait(1)

    monkeypatch.setattr(background, "write", write)

    def on_rank(rank: int) -> None:
        saver, axis = BackgroundSaver(), MeshAxis("dp", None, rank, 2)
        pieces = [shard("param", "w", torch.ones(10), 5 * rank, 5 * rank + 5)]
        saver.save(Target(tmp_path, "a"), pieces, axis=axis, rank_state={}, shared_state={}, since_s=0.0)
        saver.wait()

    errors = run_ranks_as_threads(on_rank, 2)
    assert all("heard nothing of rank 1 for 0.3 s" in str(error) for error in errors), errors
    assert names(tmp_path) == []
