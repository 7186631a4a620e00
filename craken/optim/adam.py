"""Adam with the switches of DeepSpeed's configs, on torch's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from craken.optim.first_step import StateStarter
from craken.optim.fused import fuse_groups

# From here on a float32 step counter no longer moves, and beta ** step is zero for every beta in use: the kernels'
# bias corrections are then exactly 1, which is Adam without them.
_UNCORRECTED_STEP = 2.0**24


class Adam(torch.optim.Adam):
    """Adam (arXiv 1412.6980); decoupled weight decay (arXiv 1711.05101) unless `adam_w_mode` is false.

    Runs torch's fused kernels where every parameter allows. Group dicts passed in are kept as the same objects; their
    decay mode becomes this optimizer's. Without `bias_correction` the state's `step` stands still at 2**24.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **options: Any,
    ) -> None:
        groups, fused = fuse_groups(torch.optim.Adam, params, options)
        super().__init__(groups, lr=lr, decoupled_weight_decay=adam_w_mode, **{**options, "fused": fused})
        for group in self.param_groups:
            group["decoupled_weight_decay"] = adam_w_mode
            group["bias_correction"] = bias_correction
        _UNCORRECTED.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _UNCORRECTED.watch(self)


def _is_uncorrected(group: dict[str, Any]) -> bool:
    return not group.get("bias_correction", True)


def _uncorrected_state(group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    on_device = group["fused"] or group["capturable"]
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")
    return {
        "step": torch.full((), _UNCORRECTED_STEP, device=param.device if on_device else None),
        **{name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in names},
    }


_UNCORRECTED = StateStarter(_uncorrected_state, concerns=_is_uncorrected)
