"""Lets an optimizer give its parameters their state when they first take a step with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

StartState = Callable[[dict[str, Any], Tensor], dict[str, Any] | None]


class StateStarter:
    """A step pre-hook that asks `start(group, param)` for the state of each parameter that has a gradient and none yet.

    None leaves the state to the optimizer's own step. As a hook, and not an override of `step()`, it keeps torch's
    step hooks and patches firing once.
    """

    def __init__(self, start: StartState) -> None:
        self._start = start

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None and not optimizer.state.get(param):
                    state = self._start(group, param)
                    if state is not None:
                        optimizer.state[param] = state

    def watch(self, optimizer: Optimizer) -> None:
        """Register on `optimizer` unless registered already: unpickled and copied optimizers come without hooks."""
        if self not in optimizer._optimizer_step_pre_hooks.values():
            optimizer.register_step_pre_hook(self)
