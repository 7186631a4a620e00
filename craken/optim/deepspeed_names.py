"""The optimizer classes DeepSpeed's users import by name, with its signatures, on torch's kernels.

Each keeps the very group dicts it is constructed from and touches no parameter's data until its first step.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from craken.log import warn_once
from craken.optim.adagrad import Adagrad
from craken.optim.adam import Adam
from craken.optim.lamb import Lamb
from craken.optim.lion import Lion


class FusedAdam(Adam):
    """Adam or AdamW on torch's fused kernels; `set_grad_none` is what `zero_grad` does anyway."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(
            params,
            lr,
            adam_w_mode=adam_w_mode,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
        )


class DeepSpeedCPUAdam(Adam):
    """Adam or AdamW for states that live on the host, on torch's fused CPU kernels."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        _note_state_dtype(fp32_optimizer_states)
        super().__init__(
            model_params,
            lr,
            adam_w_mode=adamw_mode,
            bias_correction=bias_correction,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
        )


class DeepSpeedCPUAdagrad(Adagrad):
    """Adagrad for states that live on the host; clients pass `adamw_mode` to every class, it means nothing here."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        *,
        adamw_mode: bool = True,
    ) -> None:
        if amsgrad:
            raise ValueError("Adagrad has no AMSGrad variant: set amsgrad to false")
        _note_state_dtype(fp32_optimizer_states)
        super().__init__(model_params, lr, eps=eps, weight_decay=weight_decay)


class DeepSpeedCPULion(Lion):
    """Lion for states that live on the host; clients pass `adamw_mode` to every class, it means nothing here."""

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
        *,
        adamw_mode: bool = True,
    ) -> None:
        _note_state_dtype(fp32_optimizer_states)
        super().__init__(model_params, lr, betas, weight_decay)


class FusedLion(Lion):
    """Lion; `set_grad_none` is what `zero_grad` does anyway."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay)


class FusedLamb(Lamb):
    """LAMB under the name DeepSpeed gives it."""


def _note_state_dtype(fp32_optimizer_states: Any) -> None:
    if not fp32_optimizer_states:
        warn_once("fp32_optimizer_states=False has no effect: states are kept in the dtype of the weights they update")
