"""The optimizer object that users hold: an ordinary-looking torch optimizer whose step belongs to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from craken.precision import LossScale
from craken.zero.access.offload_names import ParameterOffload


class ShardedOptimizer(torch.optim.Optimizer):
    """Shows the inner optimizer's groups, state and defaults; schedulers may be built on it.

    `optimizer` is the inner torch optimizer over this rank's fragments. `overflow` says whether the last step was
    skipped. Its `step` is the engine's job: micro-batches, ranks and clipping are known there. `parameter_offload` is
    there where weights come and go.
    """

    parameter_offload: ParameterOffload

    def __init__(self, optimizer: torch.optim.Optimizer, loss_scale: LossScale) -> None:
        # no super().__init__: there is one set of groups and one state, the inner optimizer's
        self.optimizer = optimizer
        self.overflow = False
        self._loss_scale = loss_scale

    def note_step(self, *, was_applied: bool) -> None:
        """Record what the engine's step did, where clients and torch's schedules look for it."""
        self.overflow = not was_applied
        self._opt_called = True  # torch's schedules warn when they step before the optimizer did

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    @property
    def loss_scale(self) -> float:
        return self._loss_scale.value

    cur_scale = loss_scale

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's part of the inner optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise RuntimeError(
            "add_param_group() after initialize(): these parameters would belong to no shard group; give all groups to "
            "initialize(), and freeze or unfreeze with requires_grad"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: gradients live in the engine's buffers and are dropped by its step."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        raise RuntimeError(
            "optimizer.step() was called on the optimizer that initialize() returned; call engine.step(), which also "
            "reduces, clips and advances the learning-rate schedule"
        )

    def __repr__(self) -> str:
        return f"ShardedOptimizer({self.optimizer!r})"
