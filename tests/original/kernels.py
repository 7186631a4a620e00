"""Gives the original's optimizers kernels on a CPU where it has none there, so that it can save their states.

Lion and Adagrad for offloaded states: its own C++, which it builds for CUDA hosts only. FusedLion and FusedLamb: their
published formulas in place of the CUDA kernels; classes, states and files stay the original's own.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Put the kernels where the original's modules look for them."""
    from deepspeed.ops.adagrad import cpu_adagrad
    from deepspeed.ops.lamb import fused_lamb
    from deepspeed.ops.lion import cpu_lion, fused_lion
    from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

    class Builder(CPUOpBuilder):
        """Compiles C++ sources of the original's for this CPU."""

        def __init__(self, name: str, sources: list[str]) -> None:
            super().__init__(name=name)
            self._sources = sources

        def absolute_name(self) -> str:
            return f"deepspeed.ops.{self.name}_op"

        def sources(self) -> list[str]:
            return self._sources

        def include_paths(self) -> list[str]:
            return ["csrc/includes"]

        def simd_width(self) -> str:
            return "-D__SCALAR__"  # Lion's vector path masks more than the sign: its updates are not Lion's

    cpu_lion.CPULionBuilder = lambda: Builder("cpu_lion", ["csrc/lion/cpu_lion.cpp", "csrc/lion/cpu_lion_impl.cpp"])
    cpu_adagrad.CPUAdagradBuilder = lambda: Builder("cpu_adagrad", ["csrc/adagrad/cpu_adagrad.cpp"])
    fused_lion.FusedLionBuilder = lambda: SimpleNamespace(load=lambda: SimpleNamespace(multi_tensor_lion=_lion))
    fused_lamb.FusedLambBuilder = lambda: SimpleNamespace(load=lambda: SimpleNamespace(lamb=_lamb))


def _lion(
    _chunk_size: int, _overflow: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, *rest: Any
) -> None:
    _step, decay = rest
    for grad, param, momentum in zip(*lists, strict=True):
        update = (beta1 * momentum + (1 - beta1) * grad).sign()
        param.sub_(lr * (update + decay * param))
        momentum.mul_(beta2).add_(grad, alpha=1 - beta2)


def _lamb(
    param: Tensor, rounded: Tensor, momentum: Tensor, variance: Tensor, grad: Tensor, lr: float, *settings: Any
) -> Tensor:
    beta1, beta2, most, least, eps, scale, step, is_eps_outside, corrects_bias, decay = settings
    grad = grad.float() / scale
    momentum.mul_(beta1).add_(grad, alpha=1 - beta1)
    variance.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    divisor = variance.sqrt() + eps if is_eps_outside else (variance + eps).sqrt()
    update = momentum / divisor + decay * param
    norms = param.norm(), update.norm()
    ratio = (norms[0] / norms[1]).clamp(least, most) if all(norms) else torch.ones(())
    size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) if corrects_bias else lr
    param.sub_(size * ratio * update)
    if rounded.numel():
        rounded.data.copy_(param)
    return ratio.reshape(1)
