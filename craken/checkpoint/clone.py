"""Copies of nested states that own their memory, for `torch.save` and safetensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """Return `item` (nested dicts, lists, tuples) with each tensor a detached copy on `device` in storage of its own.

    A view of a large buffer becomes just its elements. Containers are new and keep their type (OrderedDict, named
    tuple); a tensor found twice becomes one copy found twice, so tied weights stay tied; other values are passed on.
    """
    return _clone(item, torch.device(device), {})


def _clone(item: Any, device: torch.device, seen: dict[int, Tensor]) -> Any:
    if isinstance(item, Tensor):
        if id(item) not in seen:
            seen[id(item)] = item.detach().to(device, copy=True, memory_format=torch.contiguous_format)
        return seen[id(item)]
    if isinstance(item, dict):
        return type(item)((key, _clone(value, device, seen)) for key, value in item.items())
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_clone(value, device, seen) for value in item))
    if isinstance(item, list | tuple):
        return type(item)(_clone(value, device, seen) for value in item)
    return item
