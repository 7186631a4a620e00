"""Adagrad on torch's kernels, with state made at a parameter's first gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from craken.optim.first_step import StateStarter
from craken.optim.fused import fuse_groups


class Adagrad(torch.optim.Adagrad):
    """Adagrad (jmlr.org/papers/v12/duchi11a.html), fused where torch has the kernel.

    torch's own makes its state in the constructor, from tensors that may be placeholders or stand for a shard; here
    it is made when a parameter first takes a step, as every other optimizer does.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-2, **options: Any) -> None:
        groups, fused = fuse_groups(torch.optim.Adagrad, params, options)
        super().__init__(groups, lr=lr, **{**options, "fused": fused})
        self.state.clear()
        _STARTER.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _STARTER.watch(self)


def _state(group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    return {
        "step": torch.zeros((), device=param.device if group["fused"] else None),
        "sum": torch.full_like(param, group["initial_accumulator_value"], memory_format=torch.preserve_format),
    }


_STARTER = StateStarter(_state)
