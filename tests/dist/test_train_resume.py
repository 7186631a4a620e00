"""`craken train` on the pool: its curve goes on on other ranks, beyond an epoch too; the shipped configurations train."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist

from craken.checkpoint import list_tags
from tests.dist.test_checkpoint_url import reach_store

TEXT = "\n".join(f"def add_{n}(left, right):\n    return left + right * {n}\n" for n in range(250))
STEPS, SAVED_AT = 7, 2
CONFIG = {"optimizer": {"type": "AdamW"}, "gradient_clipping": 0.3}  # Muon computes in bf16, which magnifies rounding
FLAGS = ["--model", "tiny", "--precision", "fp32", "--seq-len", "32", "--steps", str(STEPS), "--keep-last", "0"]
FLAGS += ["--zero", "2", "--eval-every", "99", "--eval-windows", "2", "--save-every", str(SAVED_AT)]


class Run(NamedTuple):
    losses: list[float]  # of every step in the metrics
    shown: str
    batch: tuple[int, int, int]  # a step, a micro-batch, accumulation
    num_windows: int


def train(*argv: str) -> Run:
    """Collective: run `craken train` on the ranks there are, without its model to show."""
    from rich.console import Console

    from craken.comm import broadcast_object, init_distributed, world_axis
    from craken.stop import StopRequest
    from craken.train.arguments import parse, resolve, save_given
    from craken.train.loop import Trainer
    from craken.train.prepare import prepare
    from craken.train.progress import PrepareProgress
    from craken.train.windows import Windows

    shown = Console(file=io.StringIO())
    init_distributed()
    options, plan, num_ranks = resolve(parse(list(argv)), has_accelerator=False), None, dist.get_world_size()
    if dist.get_rank() == 0:
        with PrepareProgress(shown) as report:
            plan = prepare(options, num_ranks=num_ranks, report=report)
        options.output.mkdir(parents=True, exist_ok=True)
        save_given(options, num_ranks=num_ranks, batch_size=plan.batch.train_batch_size)
    plan = broadcast_object(plan, world_axis())
    trainer = Trainer(plan, shown)
    trainer.run(StopRequest())
    trainer.engine.destroy()
    rows = [json.loads(line) for line in (options.output / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return Run(losses, shown.file.getvalue(), tuple(plan.batch), len(Windows(plan.cache.train(), options.seq_len)))


@pytest.fixture(scope="module")
def whole(run_ranks, tmp_path_factory) -> tuple[Path, Run]:
    """A run of two ranks: its folder, with the checkpoint of an early step as the latest, and what came out."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "text.py").write_text(TEXT, "utf-8")
    output = folder / "whole"
    (folder / "ds.json").write_text(json.dumps(CONFIG), "utf-8")
    paths = ["--data", str(folder / "text.py"), "--config", str(folder / "ds.json"), "--output", str(output)]
    run = run_ranks(train, 2, *FLAGS, *paths)[0]
    (output / "checkpoints" / "latest").write_text(f"step{SAVED_AT}")
    return output, run


@pytest.mark.parametrize(
    ("world_size", "flags", "batch"),
    [(1, [], (32, 2, 16)), (1, ["--accumulation", "16"], (32, 2, 16)), (2, ["--micro-batch", "4"], (32, 4, 4))],
)
def test_the_curve_goes_on_and_a_step_keeps_its_sequences(run_ranks, tmp_path, whole, world_size, flags, batch) -> None:
    output, expected = whole
    assert expected.num_windows % 32 > 2, "epochs end between two steps"
    assert SAVED_AT < expected.num_windows // 32 < STEPS
    shutil.copytree(output, tmp_path / "run")
    run = run_ranks(train, world_size, "--resume", str(tmp_path / "run"), *flags)[0]
    assert run.batch == batch
    assert run.losses == pytest.approx(expected.losses, abs=1e-6)
    said = f"keeps its 32 sequences: accumulation {batch[2]} instead of 8"
    assert run.shown.count(said) == ("--accumulation" not in flags)



def train_with_store(*argv: str) -> Run:
    reach_store()
    return train(*argv)


def test_a_run_goes_on_from_a_store_where_nothing_else_of_it_is_left(run_ranks, tmp_path, whole) -> None:
    output, expected = whole
    store = tmp_path / "store"
    shutil.copytree(output / "checkpoints" / f"step{SAVED_AT}", store / f"step{SAVED_AT}")
    (store / "latest").write_text(f"step{SAVED_AT}")
    url, rest = f"shared://{store}", expected.losses[SAVED_AT:]
    where = ["--output", str(tmp_path / "one"), "--checkpoints", url, "--keep-last", "2"]
    run = run_ranks(train_with_store, 2, *where, "--resume", "auto")[0]
    assert (run.losses, run.batch) == (rest, expected.batch)
    assert list_tags(store) == ["step6", "step7"]
    shutil.rmtree(store / "step7")
    (store / "latest").write_text("step6")
    run = run_ranks(train_with_store, 1, "--resume", url, "--output", str(tmp_path / "two"))[0]
    assert run.losses == pytest.approx(rest[4:], abs=1e-6)
    assert run.batch == (32, 2, 16)
    run = run_ranks(train_with_store, 1, "--resume", str(tmp_path / "two"), "--steps", "8")[0]
    assert len(run.losses) == 2


def command(*argv: str) -> tuple[int, str]:
    """Collective: run the whole command, as on the ranks of a launcher; returns its exit code and what it showed."""
    from craken.stop import StopRequest
    from craken.train.command import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        return main(list(argv), request=StopRequest()), shown.getvalue()


@pytest.mark.parametrize("number", [1, 3])
def test_a_launchers_ranks_are_used_as_they_are_and_the_shipped_configurations_train(
    run_ranks, tmp_path, number
) -> None:
    (tmp_path / "text.py").write_text(TEXT, "utf-8")
    file = Path(__file__).resolve().parents[2] / "configs" / f"ds_zero{number}_config.json"
    paths = ["--data", str(tmp_path / "text.py"), "--config", str(file), "--output", str(tmp_path / "out")]
    flags = ["--model", "tiny", "--seq-len", "32", "--steps", "2", "--eval-every", "2", "--minutes", "9"]
    (code, shown), other = run_ranks(command, 2, *flags, *paths, joins_world=False)
    assert code == 0
    assert other == (0, "")
    assert f"ZeRO stage {number}" in " ".join(shown.split()) or f"ZeRO-{number}" in shown
    assert shown.count("done: 2 steps") == 1
    assert json.loads((tmp_path / "out" / "flags.json").read_text())["ranks"] == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
