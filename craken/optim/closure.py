"""Runs the closure that torch optimizers may be given to compute the loss anew."""

from __future__ import annotations

from collections.abc import Callable

import torch


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """Return what `closure` returns, run with gradients on inside of a step that has them off; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
