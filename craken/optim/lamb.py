"""LAMB: Adam's direction, scaled layer by layer by the ratio of weight norm to update norm (arXiv 1904.00962).

For each parameter, with Adam's moments m and v:

    u     = m / (sqrt(v) + eps) + weight_decay * p
    ratio = clamp(|p| / |u|, min_coeff, max_coeff),  1 where either norm is zero
    p    -= lr * correction * ratio * u,             correction = sqrt(1 - b2^t) / (1 - b1^t), or 1 without it

Both norms are of the whole layer. Where ranks hold fragments of it, each contributes the squared norms of its
fragments: one [num_params, 2] tensor a step goes through `sum_over_shards`. Since the ratio is known only after that,
u is formed twice, block by block, rather than kept: the step needs no memory that grows with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from craken.optim.blocks import Run, runs
from craken.optim.closure import loss_of
from craken.optim.options import check_rates


class Lamb(Optimizer):
    """LAMB (arXiv 1904.00962) with DeepSpeed's options; `amsgrad` is refused, as there.

    `sum_over_shards`, when set, must return the elementwise sum over ranks of the float64 tensor it gets; then every
    rank must hold the same parameters in the same order, each as a (possibly empty) fragment, and `step` is
    collective. Parameters without a gradient are left alone, decay included.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        check_rates(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        if amsgrad:
            raise ValueError("Lamb has no AMSGrad variant: set amsgrad to false")
        if max_grad_norm:
            raise ValueError("Lamb does not clip: set 'gradient_clipping' in the config in place of max_grad_norm")
        if not 0 <= min_coeff <= max_coeff:
            raise ValueError(f"expected 0 <= min_coeff <= max_coeff, got {min_coeff} and {max_coeff}")
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "eps_inside_sqrt": eps_inside_sqrt,
            "weight_decay": weight_decay,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)
        self.sum_over_shards: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective when `sum_over_shards` is set."""
        loss = loss_of(closure)
        norms = self._measure()  # [num_params, 2], float64: squared norms of weight and update
        if self.sum_over_shards is not None:
            norms = self.sum_over_shards(norms)
        first = 0
        for group in self.param_groups:
            count = len(group["params"])
            self._apply(group, norms[first : first + count])
            first += count
        return loss

    def _measure(self) -> Tensor:
        """Advance the moments; return the squared norms of fragments and updates, zeros without a gradient."""
        params = [param for group in self.param_groups for param in group["params"]]
        device = params[0].device if params else torch.device("cpu")
        squares = torch.zeros(len(params), 2, dtype=torch.float64, device=device)
        first = 0
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            live, places = self._live(group)
            for param in live:
                self._state_of(param)["step"] += 1
            for run in self._runs(live, with_grads=True):
                weights, momenta, variances, grads = run.lists
                torch._foreach_lerp_(momenta, grads, 1.0 - beta1)
                torch._foreach_mul_(variances, beta2)
                torch._foreach_addcmul_(variances, grads, grads, 1.0 - beta2)
                owners = torch.tensor([first + places[owner] for owner in run.owners], device=device)
                found = torch.stack([_squares(weights), _squares(_updates(group, run))], dim=1).to(device)
                squares.index_add_(0, owners, found)
            first += len(group["params"])
        return squares

    def _apply(self, group: dict[str, Any], norms: Tensor) -> None:
        live, places = self._live(group)
        if not live:
            return
        weight, update = norms[places].sqrt().unbind(1)
        ratio = (weight / update).clamp(group["min_coeff"], group["max_coeff"])
        ratio = torch.where((weight > 0) & (update > 0), ratio, 1.0)
        sizes = torch.tensor([-self._step_size(group, param) for param in live], dtype=torch.float64)
        factors = (ratio * sizes.to(ratio.device)).float().unbind()
        for run in self._runs(live, with_grads=False):
            updates = _updates(group, run)
            torch._foreach_mul_(updates, [factors[owner].to(updates[0].device) for owner in run.owners])
            torch._foreach_add_(run.lists[0], updates)

    def _step_size(self, group: dict[str, Any], param: Tensor) -> float:
        lr = float(group["lr"])
        if not group["bias_correction"]:
            return lr
        (beta1, beta2), step = group["betas"], float(self.state[param]["step"])
        return lr * float((1.0 - beta2**step) ** 0.5) / (1.0 - float(beta1**step))

    def _live(self, group: dict[str, Any]) -> tuple[list[Tensor], list[int]]:
        """Return the parameters that have a gradient and their places in the group."""
        places = [place for place, param in enumerate(group["params"]) if param.grad is not None]
        return [group["params"][place] for place in places], places

    def _runs(self, live: list[Tensor], *, with_grads: bool) -> Iterator[Run]:
        states = [self.state[param] for param in live]
        lists = [live, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]]
        return runs(*lists, [param.grad for param in live if param.grad is not None]) if with_grads else runs(*lists)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def _updates(group: dict[str, Any], run: Run) -> list[Tensor]:
    """Form u for the blocks of a run, in new tensors."""
    weights, momenta, variances = run.lists[:3]
    eps = group["eps"]
    if group["eps_inside_sqrt"]:
        updates = torch._foreach_add(variances, eps)
        torch._foreach_sqrt_(updates)
    else:
        updates = torch._foreach_sqrt(variances)
        torch._foreach_add_(updates, eps)
    torch._foreach_reciprocal_(updates)
    torch._foreach_mul_(updates, momenta)
    if group["weight_decay"]:
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
    return list(updates)


def _squares(blocks: list[Tensor]) -> Tensor:
    """Return each block's squared norm in float64. Shape [num_blocks]."""
    if blocks[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(blocks, 2, torch.float32)).double().square()
    # The CPU's norm kernel adds up in a few lanes and loses digits (1e-5 on constant data); its sum does not.
    return torch.stack([block.float().square().sum() for block in blocks]).double()
