"""Loss scales: fp16 gradients underflow below 6e-8, so the loss is multiplied before backward, and divided out after.

Dynamic scaling (arXiv 1710.03740) doubles the scale after more than `window` good steps and halves it on overflow
(the same sequence of scales as DeepSpeed's, step by step):

    good, good, ..., good (window + 1)      -> scale * 2
    overflow                                -> hysteresis - 1; once it is used up: scale / 2, not under `min_scale`

An overflowed step is skipped. Whether any rank overflowed is agreed elsewhere; `update` hears the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class LossScale(Protocol):
    """The number the loss is multiplied by, and how it moves."""

    @property
    def value(self) -> float: ...
    def update(self, *, has_overflow: bool) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class StaticLossScale:
    """A scale that stays; 1.0 for fp32 and bf16."""

    value: float = 1.0

    def update(self, *, has_overflow: bool) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])


@dataclass
class DynamicLossScale:
    """A scale that looks for the largest value without overflow.

    hysteresis: how many overflows it takes to lower the scale; refilled when the scale grows, or after every good step
    with `consecutive_hysteresis`.
    """

    value: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    min_scale: float = 1.0
    consecutive_hysteresis: bool = False
    factor: float = 2.0
    hysteresis_left: int = -1
    steps_seen: int = 0
    last_overflow: int = -1

    def __post_init__(self) -> None:
        if self.hysteresis_left < 0:
            self.hysteresis_left = self.hysteresis

    def update(self, *, has_overflow: bool) -> None:
        """Move the scale after a step that did or did not overflow.

        Raises RuntimeError when gradients overflow although the scale is at its minimum: training has diverged.
        """
        if has_overflow:
            self._lower()
            self.last_overflow = self.steps_seen
        else:
            if self.consecutive_hysteresis:
                self.hysteresis_left = self.hysteresis
            stable = self.steps_seen - self.last_overflow - 1
            if stable > 0 and stable % self.window == 0:
                if not self.consecutive_hysteresis:
                    self.hysteresis_left = self.hysteresis
                self.value *= self.factor
        self.steps_seen += 1

    def _lower(self) -> None:
        if self.hysteresis_left > 1:
            self.hysteresis_left -= 1
        elif self.value <= self.min_scale:
            raise RuntimeError(
                f"gradients overflow although the loss scale is at its minimum {self.min_scale:g}: the loss is not "
                "finite or has diverged. Lower the learning rate, clip harder (gradient_clipping), or use bf16"
            )
        else:
            self.value = max(self.value / self.factor, self.min_scale)

    def state_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "hysteresis_left": self.hysteresis_left,
            "steps_seen": self.steps_seen,
            "last_overflow": self.last_overflow,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = float(state["value"])
        self.hysteresis_left = int(state["hysteresis_left"])
        self.steps_seen = int(state["steps_seen"])
        self.last_overflow = int(state["last_overflow"])
