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

    def __init__(self, start: StartState, *, concerns: Callable[[dict[str, Any]], bool] = lambda group: True) -> None:
        """`concerns(group)` says whether `start` has anything for the parameters of a group."""
        self._start, self._concerns = start, concerns

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group in filter(self._concerns, optimizer.param_groups):
            for param in group["params"]:
                if param.grad is not None and not optimizer.state.get(param):
                    state = self._start(group, param)
                    if state is not None:
                        optimizer.state[param] = state

    def watch(self, optimizer: Optimizer) -> None:
        """Register on `optimizer` unless registered already: unpickled and copied optimizers come without hooks."""
        if self not in optimizer._optimizer_step_pre_hooks.values():
            optimizer.register_step_pre_hook(self)
