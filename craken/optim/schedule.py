"""What every learning-rate schedule of DeepSpeed's shares: a position, and rates written into the live groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class Schedule(ABC):
    """A learning rate a group as a function of the number of steps taken.

    A fresh schedule (`last_batch_iteration` -1) writes its starting rates at once; one built to go on from an
    iteration leaves them alone until the next `step()`. Only `group["lr"]` of `optimizer.param_groups` is written,
    in place where it is a tensor, so whoever shares the group dicts sees the rate.
    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(f"a schedule needs a torch optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] | None = None

    @abstractmethod
    def rates_at(self, iteration: int) -> list[float]:
        """Return every group's rate after the step numbered `iteration`, counted from 0; -1 is before the first."""

    def get_lr(self) -> list[float]:
        """Return every group's rate at the current position."""
        return self.rates_at(self.last_batch_iteration)

    def get_last_lr(self) -> list[float]:
        """Return the rates written last; `AssertionError` before anything was written, which clients expect."""
        if self._last_lr is None:
            raise AssertionError("need to call step() first")
        return self._last_lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Move on by one step, or to the given iteration, and write the rates."""
        if last_batch_iteration is None:
            last_batch_iteration = self.last_batch_iteration + 1
        self.last_batch_iteration = last_batch_iteration
        self._write(self.get_lr())

    def state_dict(self) -> dict[str, Any]:
        """Return the position: all there is to a schedule besides its parameters."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        """Take up the position; the next `step()` writes rates; the optimizer's state holds the current ones."""
        self.last_batch_iteration = sd["last_batch_iteration"]

    def _write_if_fresh(self, rates: list[float], *, remember: bool = True) -> None:
        if self.last_batch_iteration == -1:
            self._write(rates)
            self._last_lr = self._last_lr if remember else None

    def _write(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = list(rates)


def per_group(optimizer: Optimizer, value: float | Sequence[float], name: str) -> list[float]:
    """Return one number a parameter group: `value` itself when it is a list, as often as needed when it is a number."""
    count = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        value = [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values, expected one for each of the {count} parameter groups")
    for item in value:
        at_least_zero(item, name)
    return [float(item) for item in value]


def at_least_zero(value: float, name: str) -> float:
    """Return `value`; `ValueError` unless it is a number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    return value


def positive_steps(value: float, name: str) -> int:
    """Return a number of steps as an int; `ValueError` unless it is a whole number of at least 1."""
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value)
    if not whole or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)
