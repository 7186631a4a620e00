"""Saving in the background of training: what is saved is the state at the call, and a failure reaches every rank."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from craken.checkpoint import background, newest_first, verify
from tests.dist.test_resume import start, train, whole_state

SAVED_AT, STEPS = 2, 5


@contextlib.contextmanager
def writing_held_up() -> Iterator[threading.Event]:
    """Let no background write begin before the event is set."""
    gate, real = threading.Event(), background.write

    def write(*args: Any) -> Any:
        assert gate.wait(30)
        return real(*args)

    with patch.object(background, "write", write):
        try:
            yield gate
        finally:
            gate.set()


def started(stage: int, precision: str, seed: int, **checkpoint: Any) -> tuple[Any, Iterator[Any]]:
    from craken.engine import RepeatingLoader

    engine, _, loader, _ = start(stage, precision, seed, checkpoint={"async_save": True, **checkpoint})
    return engine, iter(RepeatingLoader(loader))


def train_through_a_save(folder: str, stage: int, precision: str) -> None:
    engine, batches = started(stage, precision, seed=0)
    train(engine, batches, SAVED_AT)
    with writing_held_up() as gate:
        engine.save_checkpoint(folder, client_state={"note": "x"})
        expected = train(engine, batches, STEPS - SAVED_AT)  # steps change in place what the writer has not read yet
        assert newest_first(folder) == []
        gate.set()
        engine.wait_for_checkpoint()
    weights = whole_state(engine)
    engine.destroy()
    assert verify(Path(folder) / f"global_step{SAVED_AT}") == []

    engine, batches = started(stage, precision, seed=99)
    assert engine.load_checkpoint(folder) == (str(Path(folder) / f"global_step{SAVED_AT}"), {"note": "x"})
    from craken.engine import RepeatingLoader

    assert train(engine, iter(RepeatingLoader(engine.training_dataloader)), STEPS - SAVED_AT) == expected
    for name, value in whole_state(engine).items():
        assert torch.equal(value, weights[name]), name
    engine.destroy()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "bf16")])
def test_steps_taken_while_a_checkpoint_is_written_are_not_in_it(run_ranks, tmp_path, stage, precision) -> None:
    run_ranks(train_through_a_save, 2, str(tmp_path), stage, precision)


def fail_in_the_background(folder: str) -> tuple[list[str], int]:
    """Rank 1 cannot write, time and again; returns what the calls after it raise, and the step that raised."""
    engine, batches = started(2, "fp32", seed=0, keep_last=2)
    train(engine, batches, 1)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    real, told = background.write, []

    def refuse(*args: Any) -> Any:
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    def save() -> None:
        engine.save_checkpoint(folder, tag="again")

    def step() -> None:
        train(engine, batches, 1000)

    for call in (step, save, engine.wait_for_checkpoint, engine.destroy):
        with patch.object(background, "write", refuse):
            engine.save_checkpoint(folder, tag="lost")
            with pytest.raises(OSError, match="No space left") as caught:
                call()
        told.append(str(caught.value))
        assert sorted(os.listdir(folder)) == ["global_step1", "latest", "zero_to_fp32.py"]
        if call != engine.destroy:
            train(engine, batches, 1)
            engine.save_checkpoint(folder, tag="global_step1")
            engine.wait_for_checkpoint()
    return told, engine.global_steps


def test_a_failure_in_the_background_is_raised_on_all_ranks_at_the_next_call(run_ranks, tmp_path) -> None:
    first, second = run_ranks(fail_in_the_background, 2, str(tmp_path))
    assert first == second
    expected = f"saving a checkpoint to {tmp_path} failed on 1 of 2 ranks: rank 1: OSError: [Errno 28] No space left"
    assert [text.startswith(expected) for text in first[0]] == [True] * 4
    assert verify(tmp_path / "global_step1") == []


def lose_the_others_on_one_rank(folder: str) -> str:
    engine, batches = started(2, "fp32", seed=0)
    train(engine, batches, 1)
    real = background._write_and_agree

    def lose(*args: Any) -> Any:
        verdict = real(*args)
        if dist.get_rank() == 1:
            raise RuntimeError("no letter came")
        return verdict

    with patch.object(background, "_write_and_agree", lose):
        engine.save_checkpoint(folder, tag="a")
        deadline_s = time.monotonic() + 30
        with pytest.raises(RuntimeError, match="lost the others") as caught:
            while time.monotonic() < deadline_s:
                train(engine, batches, 1)
    train(engine, batches, 1)  # ranks are in step
    engine.save_checkpoint(folder, tag="b")
    engine.destroy()
    return str(caught.value)


def test_a_rank_that_loses_the_others_stops_all_in_the_same_step(run_ranks, tmp_path) -> None:
    first, second = run_ranks(lose_the_others_on_one_rank, 2, str(tmp_path))
    assert "1 of 2 ranks lost the others" in first
    assert "rank 1 has lost the others: no letter came" in second
    assert verify(tmp_path / "b") == []


def save_twice_at_once(folder: str) -> tuple[float, int, bool]:
    engine, _ = started(1, "fp32", seed=0)
    with writing_held_up() as gate:
        engine.save_checkpoint(folder, tag="a")
        first = engine.checkpoint_stall
        threading.Timer(0.3, gate.set).start()
        engine.save_checkpoint(folder, tag="b")
        second = engine.checkpoint_stall
    engine.destroy()
    return second.waited_s, second.num_bytes, first.seconds < 0.3


def test_a_second_save_waits_for_the_first(run_ranks, tmp_path) -> None:
    for waited_s, num_bytes, first_was_short in run_ranks(save_twice_at_once, 2, str(tmp_path)):
        assert waited_s > 0.2
        assert num_bytes > 1000
        assert first_was_short
    assert newest_first(tmp_path) == ["b", "a"]
    assert verify(tmp_path / "a") == verify(tmp_path / "b") == []


def die_while_writing(folder: str) -> None:
    engine, batches = started(2, "fp32", seed=0)
    engine.save_checkpoint(folder, tag="whole")
    engine.wait_for_checkpoint()
    with writing_held_up() as gate:
        engine.save_checkpoint(folder, tag="torn")
        train(engine, batches, 1)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        gate.set()
        time.sleep(30)


def save_after_a_death(folder: str) -> str:
    engine, _ = started(2, "fp32", seed=5)
    path, _ = engine.load_checkpoint(folder)
    engine.save_checkpoint(folder, tag="next")
    engine.destroy()
    return str(path)


def test_a_rank_that_dies_while_it_writes_leaves_the_previous_and_the_next_save_tidies(run_ranks, tmp_path) -> None:
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(die_while_writing, 2, str(tmp_path))
    assert newest_first(tmp_path) == ["whole"]
    assert run_ranks(save_after_a_death, 2, str(tmp_path)) == [str(tmp_path / "whole")] * 2
    assert sorted(os.listdir(tmp_path)) == ["latest", "next", "whole", "zero_to_fp32.py"]


SCRIPT = """
import atexit, os, sys
import torch
import craken
atexit.register(print, "goodbye")
craken.init_distributed()
engine, *_ = craken.initialize(model=torch.nn.Linear(700, 1000), config={
    "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "checkpoint": {"async_save": True}})
if sys.argv[2] == "full" and os.environ.get("RANK", "1") == "1":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
engine.save_checkpoint(sys.argv[1], tag="a")
"""
LAUNCH = "import sys; from craken.launch import launch_local; sys.exit(launch_local(sys.argv[1:], 2))"


@pytest.mark.parametrize("disk", ["free", "full"])
def test_a_program_that_ends_right_after_a_save_waits_for_it_and_never_fails_in_silence(tmp_path, disk) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    ranks = [sys.executable, "-c", LAUNCH, sys.executable] if disk == "full" else [sys.executable]
    command = [*ranks, str(tmp_path / "script.py"), str(tmp_path / "saved"), disk]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "in the background: training stood still for" in result.stderr
    if disk == "free":
        assert result.returncode == 0, result.stderr
        assert verify(tmp_path / "saved" / "a") == []
        assert f"saved {tmp_path / 'saved' / 'a'}: 2,8" in result.stderr  # 2.8 MB
    else:
        assert result.returncode == 1
        assert "failed first, with OSError (exit code 1).\nOSError: saving a checkpoint to " in result.stderr
        assert result.stdout.count("goodbye") == 2
        assert "File too large" in result.stderr
        assert os.listdir(tmp_path / "saved") == []
