"""Writes a run's figures to `metrics.jsonl`, one JSON object a line, and reads them back to report and resume."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step of the whole job. `sent_bytes` and the memory figures are those of rank 0."""

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens: int  # since the start of the run
    tokens_per_s: float
    step_s: float
    elapsed_s: float
    memory_bytes: int
    peak_memory_bytes: int
    sent_bytes: int
    skipped_steps: int


@dataclass(frozen=True)
class EvalMetrics:
    """One validation: nats a token on the held-out windows, beside what token frequencies alone reach on them."""

    step: int
    val_loss: float
    unigram_entropy: float
    val_tokens: int
    elapsed_s: float


class MetricsFile:
    """The metrics of one run, kept in memory for the report and appended to `metrics.jsonl` line by line.

    Opened for a run that goes on after `last_step`, it drops the lines of later steps, which will be run again.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        rows = [row for row in read_rows(path) if row["step"] <= last_step] if last_step else []
        self.steps = [StepMetrics(**row) for row in rows if "loss" in row]
        self.evals = [EvalMetrics(**row) for row in rows if "val_loss" in row]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(_line(row) for row in rows), "utf-8")
        partial.replace(path)
        self._out = path.open("a", encoding="utf-8", buffering=1)

    def add_step(self, row: StepMetrics) -> None:
        self.steps.append(row)
        self._out.write(_line(asdict(row)))

    def add_eval(self, row: EvalMetrics) -> None:
        self.evals.append(row)
        self._out.write(_line(asdict(row)))

    def close(self) -> None:
        self._out.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a metrics file, oldest first; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line, parse_constant=float))
        except ValueError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN or infinity; null keeps the file readable everywhere
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(clean) + "\n"
