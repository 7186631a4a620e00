"""Lion: the sign of an interpolated momentum, with one state a parameter (arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from craken.optim.blocks import runs
from craken.optim.closure import loss_of
from craken.optim.options import check_rates


class Lion(Optimizer):
    """Lion (arXiv 2302.06675): `p -= lr * (sign(b1 m + (1 - b1) g) + weight_decay p)`, then `m = b2 m + (1 - b2) g`.

    Any cut of a parameter gives the same result. Parameters without a gradient are left alone, decay included.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        check_rates(lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        keep = 1.0 - lr * group["weight_decay"]
        live: list[Tensor] = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in live if param.grad is not None]
        for run in runs(live, grads, [self._momentum(param) for param in live]):
            params, gradients, momenta = run.lists
            updates = torch._foreach_lerp(momenta, gradients, 1.0 - beta1)
            torch._foreach_sign_(updates)
            if keep != 1.0:
                torch._foreach_mul_(params, keep)
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_lerp_(momenta, gradients, 1.0 - beta2)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        momentum: Tensor = state["exp_avg"]
        return momentum
