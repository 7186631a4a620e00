"""Schedules that search for a rate or sweep through a range of them: the range test and the one-cycle policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch.optim import Optimizer

from craken.log import warn_once
from craken.optim.schedule import Schedule, at_least_zero, per_group, positive_steps


class LRRangeTest(Schedule):
    """Raise the rate without end, to see where training diverges (arXiv 1803.09820).

    After t steps it is `lr_range_test_min_lr * (1 + lr_range_test_step_rate * t / lr_range_test_step_size)`, the
    quotient rounded down when `lr_range_test_staircase` is set.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: float | Sequence[float] = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.min_lr = per_group(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size = positive_steps(lr_range_test_step_size, "lr_range_test_step_size")
        self.step_rate = at_least_zero(lr_range_test_step_rate, "lr_range_test_step_rate")
        self.staircase = lr_range_test_staircase
        self._write_if_fresh(self.min_lr)

    def rates_at(self, iteration: int) -> list[float]:
        """Return every group's rate after the step numbered `iteration`."""
        interval = (iteration + 1) / self.step_size
        growth = 1.0 + self.step_rate * (math.floor(interval) if self.staircase else interval)
        return [rate * growth for rate in self.min_lr]


class _Cycle(NamedTuple):
    """One rise and one fall: how far up it stands after so many steps, and how long ago it ended."""

    first_steps: int
    second_steps: int
    first_stairs: float
    second_stairs: float

    def height_at(self, steps: int) -> float:
        """Return 0 at the start and the end, 1 at the top; rounded down to a stair where there are stairs."""
        if steps <= self.first_steps:
            height, stairs = steps / self.first_steps, self.first_stairs
        else:
            height, stairs = 1.0 - (steps - self.first_steps) / self.second_steps, self.second_stairs
        # A little slack: 3 * (1 / 3) of a rise must not fall a stair short through rounding.
        return math.floor(height * stairs + 1e-9) / stairs if stairs else height

    def steps_after(self, steps: int) -> int:
        return steps - self.first_steps - self.second_steps


class OneCycle(Schedule):
    """Raise the rate and lower it again while momentum does the reverse, then let both decay (arXiv 1708.07120).

    Momentum is the first of `betas`; an optimizer without betas gets rates only. After the cycle the rate is
    `cycle_min_lr / (1 + decay_lr_rate * t / decay_step_size)` and the momentum
    `cycle_max_mom * (1 + decay_mom_rate * t / decay_step_size)`; a `decay_step_size` of 0 leaves both where they are.
    """

    def __init__(  # DeepSpeed's signature
        self,
        optimizer: Optimizer,
        cycle_min_lr: float | Sequence[float],
        cycle_max_lr: float | Sequence[float],
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: float = 0.8,
        cycle_max_mom: float = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        first = positive_steps(cycle_first_step_size, "cycle_first_step_size")
        second = first if cycle_second_step_size is None else cycle_second_step_size
        stairs = cycle_first_stair_count if cycle_second_stair_count is None else cycle_second_stair_count
        self._cycle = _Cycle(
            first_steps=first,
            second_steps=positive_steps(second, "cycle_second_step_size"),
            first_stairs=at_least_zero(cycle_first_stair_count, "cycle_first_stair_count"),
            second_stairs=at_least_zero(stairs, "cycle_second_stair_count"),
        )
        self.min_lrs = per_group(optimizer, cycle_min_lr, "cycle_min_lr")
        self.max_lrs = per_group(optimizer, cycle_max_lr, "cycle_max_lr")
        self.decay_lr_rate = at_least_zero(decay_lr_rate, "decay_lr_rate")
        self.decay_mom_rate = at_least_zero(decay_mom_rate, "decay_mom_rate")
        self.decay_step_size = at_least_zero(decay_step_size, "decay_step_size")
        self.cycle_momentum = cycle_momentum and _has_betas(optimizer)
        self.min_mom = at_least_zero(cycle_min_mom, "cycle_min_mom")
        self.max_mom = at_least_zero(cycle_max_mom, "cycle_max_mom")
        self._write_if_fresh(self.min_lrs, remember=False)
        if self.cycle_momentum and last_batch_iteration == -1:
            self._write_momentum(cycle_min_mom)

    def rates_at(self, iteration: int) -> list[float]:
        """Return every group's rate after the step numbered `iteration`."""
        steps = iteration + 1
        after = self._cycle.steps_after(steps)
        if after >= 0:
            decay = 1.0 + self.decay_lr_rate * self._intervals(after)
            return [rate / decay for rate in self.min_lrs]
        height = self._cycle.height_at(steps)
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def get_mom(self) -> list[tuple[float, ...]] | None:
        """Return every group's betas at the current position, or None when momentum is left alone."""
        if not self.cycle_momentum:
            return None
        momentum = self._momentum_at(self.last_batch_iteration)
        return [(momentum, *group["betas"][1:]) for group in self.optimizer.param_groups]

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Move on by one step, or to the given iteration, and write rates and momenta."""
        super().step(last_batch_iteration)
        if self.cycle_momentum:
            self._write_momentum(self._momentum_at(self.last_batch_iteration))

    def _momentum_at(self, iteration: int) -> float:
        steps = iteration + 1
        after = self._cycle.steps_after(steps)
        if after >= 0:
            return self.max_mom * (1.0 + self.decay_mom_rate * self._intervals(after))
        return self.max_mom - (self.max_mom - self.min_mom) * self._cycle.height_at(steps)

    def _intervals(self, steps: int) -> float:
        return steps / self.decay_step_size if self.decay_step_size else 0.0

    def _write_momentum(self, momentum: float) -> None:
        for group in self.optimizer.param_groups:
            group["betas"] = (momentum, *group["betas"][1:])


def _has_betas(optimizer: Optimizer) -> bool:
    if "betas" in getattr(optimizer, "defaults", {}) and all("betas" in group for group in optimizer.param_groups):
        return True
    warn_once(f"OneCycle: {type(optimizer).__name__} has no betas, so only the learning rate cycles")
    return False
