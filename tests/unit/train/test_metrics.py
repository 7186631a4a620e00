"""metrics.jsonl: whole lines, readable after a crash, cut back when a run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

from craken.train.metrics import EvalMetrics, MetricsFile, StepMetrics, read_rows


def _step(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(step, loss, 1e-3, 0.5, step * 64, 900.0, 0.1, step * 0.1, 10**9, 2 * 10**9, 12345, 0)


def _write(path: Path, num_steps: int) -> None:
    file = MetricsFile(path)
    for step in range(1, num_steps + 1):
        file.add_step(_step(step))
        if step % 2 == 0:
            file.add_eval(EvalMetrics(step, 1.9, 3.0, 640, step * 0.1))
    file.close()


def test_every_line_is_json_with_its_step(tmp_path) -> None:
    _write(tmp_path / "metrics.jsonl", 4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes", "sent_bytes", "skipped_steps"} <= rows[0].keys()


def test_a_run_that_goes_on_drops_the_steps_it_will_run_again(tmp_path) -> None:
    _write(tmp_path / "metrics.jsonl", 6)
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=3)
    assert [row.step for row in file.steps] == [1, 2, 3]
    assert [row.step for row in file.evals] == [2]
    file.add_step(_step(4))
    file.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3, 4]


def test_a_new_run_starts_with_an_empty_file(tmp_path) -> None:
    _write(tmp_path / "metrics.jsonl", 3)
    MetricsFile(tmp_path / "metrics.jsonl").close()
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_a_line_torn_by_a_crash_is_left_out(tmp_path) -> None:
    _write(tmp_path / "metrics.jsonl", 3)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]


def test_a_loss_that_is_no_number_becomes_null(tmp_path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.add_step(_step(1, loss=math.nan))
    file.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
