"""Writes training scalars to TensorBoard, CSV files and Weights & Biases, on rank 0."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from craken.config import Config
from craken.log import rank


class Scalar(NamedTuple):
    """A value at a number of samples seen."""

    name: str
    value: float
    samples: int


def check_monitors(config: Config) -> None:
    """Raise ValueError where an enabled section's package is missing: on every rank, though rank 0 alone writes."""
    for section, is_on in (("tensorboard", config.tensorboard.enabled), ("wandb", config.wandb.enabled)):
        if is_on and importlib.util.find_spec(section) is None:
            raise ValueError(f"{section}.enabled needs a package that is missing here: pip install 'craken[monitor]'")


class Sink(Protocol):
    """Somewhere scalars are written to."""

    def write(self, scalars: Sequence[Scalar]) -> None: ...


class Monitor:
    """Hands scalars to every sink that the config turned on."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    @property
    def is_on(self) -> bool:
        return bool(self._sinks)

    def write(self, scalars: Sequence[Scalar]) -> None:
        for sink in self._sinks:
            sink.write(scalars)

    @classmethod
    def of(cls, config: Config) -> Monitor:
        """Return the monitor for a config; without sinks on ranks other than 0."""
        sinks: list[Sink] = []
        if rank() == 0:
            if config.tensorboard.enabled:
                sinks.append(_TensorBoard(config.tensorboard.output_path, config.tensorboard.job_name))
            if config.csv_monitor.enabled:
                sinks.append(_Csv(config.csv_monitor.output_path, config.csv_monitor.job_name))
            if config.wandb.enabled:
                sinks.append(_Wandb(config.wandb.project, config.wandb.group, config.wandb.team))
        return cls(sinks)


class _Csv:
    def __init__(self, output_path: str, job_name: str) -> None:
        self._folder = Path(output_path or "csv_monitor") / job_name
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, scalars: Sequence[Scalar]) -> None:
        for scalar in scalars:
            path = self._folder / f"{scalar.name.replace('/', '_')}.csv"
            is_new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if is_new:
                    writer.writerow(["samples", scalar.name])
                writer.writerow([scalar.samples, scalar.value])


class _TensorBoard:
    def __init__(self, output_path: str, job_name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(output_path or "runs") / job_name
        self._writer: Any = SummaryWriter(log_dir=str(folder))

    def write(self, scalars: Sequence[Scalar]) -> None:
        for scalar in scalars:
            self._writer.add_scalar(scalar.name, scalar.value, scalar.samples)
        self._writer.flush()


class _Wandb:
    def __init__(self, project: str, group: str | None, team: str | None) -> None:
        import wandb

        self._run: Any = wandb.init(project=project, group=group, entity=team)

    def write(self, scalars: Sequence[Scalar]) -> None:
        for scalar in scalars:
            self._run.log({scalar.name: scalar.value}, step=scalar.samples)
