"""Prepares a user's model: device and dtype of what is not sharded, the same values on every rank."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from craken.comm import MeshAxis, broadcast
from craken.zero import is_castable


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the model's parameters by name; a tied one once, under its first name."""
    return list(model.named_parameters())


def place_frozen(
    params: Iterable[tuple[str, nn.Parameter]], *, dtype: torch.dtype | None, device: torch.device, axis: MeshAxis
) -> None:
    """Collective over `axis`: move parameters that are not sharded to `device` and `dtype`, with rank 0's values."""
    for name, param in params:
        target = dtype if dtype is not None and is_castable(param) else param.dtype
        if param.device != device or param.dtype != target:
            param.data = param.data.to(device, target)
        _share(name, param.data, axis)


def place_buffers(model: nn.Module, device: torch.device, axis: MeshAxis) -> None:
    """Collective over `axis`: move buffers to `device`, dtypes as they are, with rank 0's values."""
    for owner_name, owner in model.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.device != device:
                owner._buffers[name] = buffer.to(device)
            _share(f"{owner_name}.{name}", owner._buffers[name], axis)


def _share(name: str, tensor: Tensor | None, axis: MeshAxis) -> None:
    if tensor is None or axis.size == 1 or tensor.numel() == 0:
        return
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:  # expanded: one element stands for all
            tensor = tensor.narrow(dim, 0, 1)
    # bytes: every dtype travels, and packed data are not touched
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    broadcast(flat, axis, label=name)
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))


def cast_inputs(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with its floating tensors, in nested tuples, lists and dicts, cast to `dtype`."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        # a copy filled anew: not every kind of dict can be made from one (defaultdict, BatchEncoding)
        cast = copy.copy(value)
        cast.update({key: cast_inputs(inner, dtype) for key, inner in value.items()})
        return cast
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast_inputs(inner, dtype) for inner in value))
    if isinstance(value, (tuple, list)):
        return type(value)(cast_inputs(inner, dtype) for inner in value)
    return value
