"""Decides where torch's fused optimizer kernels can run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

# Adagrad's fused kernel exists on the CPU only.
_FUSED_DEVICES: dict[type[Optimizer], frozenset[str]] = {
    Adam: frozenset({"cpu", "cuda", "xpu"}),
    AdamW: frozenset({"cpu", "cuda", "xpu"}),
    SGD: frozenset({"cpu", "cuda", "xpu"}),
    Adagrad: frozenset({"cpu"}),
}
_FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def tensors_of(parameters: Iterable[Any]) -> list[Tensor]:
    """Return every tensor in a list of tensors, of `(name, tensor)` pairs or of group dicts, in order."""
    found: list[Tensor] = []
    for item in parameters:
        if isinstance(item, dict):
            members = item["params"]
            found += tensors_of([members] if isinstance(members, Tensor) else members)
        else:
            found.append(item[1] if isinstance(item, tuple) else item)
    return found


def can_fuse(optimizer_class: type[Optimizer], parameters: Iterable[Any]) -> bool:
    """Say whether torch has a fused kernel of `optimizer_class` for the devices and dtypes of all `parameters`."""
    devices = _FUSED_DEVICES.get(optimizer_class)
    if devices is None:
        return False
    return all(t.device.type in devices and t.dtype in _FUSED_DTYPES for t in tensors_of(parameters))


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Say whether the fused kernels read `optimizer.grad_scale`, so that gradients need no pass to unscale them."""
    supports = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return supports and all(group.get("fused") for group in optimizer.param_groups)


def fuse_groups(
    optimizer_class: type[Optimizer], parameters: Iterable[Any], options: Mapping[str, Any]
) -> tuple[list[Any], bool | None]:
    """Return the parameters as a list, and what `fused=` to pass; group dicts without a choice of their own get it too.

    Groups handed over from another optimizer carry `fused: None`, which would win over the new optimizer's default.
    """
    listed = list(parameters)
    if options.get("fused") is not None or options.get("foreach") or options.get("differentiable"):
        return listed, options.get("fused")
    groups = [item for item in listed if isinstance(item, dict)]
    if any(group.get("foreach") or group.get("differentiable") for group in groups):
        return listed, None
    if not can_fuse(optimizer_class, listed):
        return listed, None
    for group in groups:
        if group.get("fused") is None:
            group["fused"] = True
    return listed, True


def fuse_where_open(optimizer: Optimizer) -> None:
    """Run torch's fused kernel in an optimizer whose user left the choice of implementation to torch.

    On the CPU torch then loops over parameters, three to five times slower. Groups with a choice of their own keep it.
    """
    for group in optimizer.param_groups:
        is_open = all(group.get(key) in (None, False) for key in ("foreach", "differentiable", "capturable"))
        if is_open and group.get("fused", False) is None and can_fuse(type(optimizer), group["params"]):
            group["fused"] = True


def unfuse_where_missing(optimizer: Optimizer) -> None:
    """Let torch choose again in groups whose tensors are where their fused kernel is not (Adagrad's on CUDA)."""
    plain = next((base for base in type(optimizer).__mro__ if base in _FUSED_DEVICES), None)
    if plain is None:
        return
    for group in optimizer.param_groups:
        if group.get("fused") and not can_fuse(plain, group["params"]):
            group["fused"] = None
