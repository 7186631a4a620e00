"""Schedules that rise to a rate and stay, fall linearly, or fall along a cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer

from craken.log import warn_once
from craken.optim.schedule import Schedule, at_least_zero, per_group, positive_steps

_WARMUP_TYPES = ("log", "linear")


class _Ramp:
    """The share of a warmup that is done, from 0 at iteration 0 to 1: linear in the iteration, or in its logarithm."""

    def __init__(self, num_steps: float, kind: str) -> None:
        if kind not in _WARMUP_TYPES:
            raise ValueError(f"warmup_type must be one of {_WARMUP_TYPES}, got {kind!r}")
        self.num_steps = max(2, positive_steps(num_steps, "warmup_num_steps"))
        self.is_linear = kind == "linear"

    def at(self, iteration: int) -> float:
        if iteration >= self.num_steps:
            return 1.0
        if self.is_linear:
            return iteration / self.num_steps
        return math.log(iteration + 1) / math.log(self.num_steps)


class WarmupLR(Schedule):
    """Rise from `warmup_min_lr` to `warmup_max_lr` (None: the optimizer's own rates) and stay.

    The rise takes `warmup_num_steps`, logarithmic or linear. Rates may be lists, one for each parameter group.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = per_group(optimizer, warmup_min_lr, "warmup_min_lr")
        self.max_lrs = per_group(optimizer, warmup_max_lr, "warmup_max_lr")
        self._ramp = _Ramp(warmup_num_steps, warmup_type)
        self._write_if_fresh(self.min_lrs)

    def rates_at(self, iteration: int) -> list[float]:
        """Return every group's rate after the step numbered `iteration`."""
        share = self._share_at(iteration) if iteration >= 0 else 0.0
        return [low + (high - low) * share for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def _share_at(self, iteration: int) -> float:
        return self._ramp.at(iteration)


class WarmupDecayLR(WarmupLR):
    """`WarmupLR`, then fall linearly back to `warmup_min_lr` at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: float | Sequence[float] = 0.0,
        warmup_max_lr: float | Sequence[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = positive_steps(total_num_steps, "total_num_steps")
        super().__init__(optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration)
        _warn_if_never_warm(self.total_num_steps, warmup_num_steps)

    def _share_at(self, iteration: int) -> float:
        warm = self._ramp.num_steps
        if iteration < warm:
            return self._ramp.at(iteration)
        return max(0.0, (self.total_num_steps - iteration) / max(1.0, self.total_num_steps - warm))


class WarmupCosineLR(Schedule):
    """Scale the optimizer's own rates: from `warmup_min_ratio` up to 1, then along a cosine to `cos_min_ratio`."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(optimizer, last_batch_iteration)
        self.total_num_steps = positive_steps(total_num_steps, "total_num_steps")
        self.warmup_min_ratio = at_least_zero(warmup_min_ratio, "warmup_min_ratio")
        self.cos_min_ratio = at_least_zero(cos_min_ratio, "cos_min_ratio")
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._ramp = _Ramp(warmup_num_steps, warmup_type)
        _warn_if_never_warm(self.total_num_steps, warmup_num_steps)
        self._write_if_fresh(self.get_lr())

    def get_lr_ratio(self) -> float:
        """Return the factor on the optimizer's own rates at the current position."""
        return self._ratio_at(self.last_batch_iteration)

    def rates_at(self, iteration: int) -> list[float]:
        """Return every group's rate after the step numbered `iteration`; 0 before the first."""
        ratio = self._ratio_at(iteration)
        return [rate * ratio for rate in self.org_lrs]

    def _ratio_at(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        warm = self._ramp.num_steps
        if iteration < warm:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self._ramp.at(iteration)
        done = min(1.0, (iteration - warm + 1) / max(1, self.total_num_steps - warm))
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * (1.0 + math.cos(math.pi * done)) / 2.0)


def _warn_if_never_warm(total_num_steps: int, warmup_num_steps: float) -> None:
    if total_num_steps < warmup_num_steps:
        warn_once(
            f"scheduler: total_num_steps is {total_num_steps}, below warmup_num_steps {warmup_num_steps}: "
            "the warmup will not finish"
        )
