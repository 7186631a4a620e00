"""Small questions about autograd: which tensors a value holds, and whether a backward runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts and dataclasses, to the given depth."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0:
        for inner in _children(value):
            yield from tensors_in(inner, depth - 1)


def _children(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return []


def is_in_backward() -> bool:
    """Say whether autograd is running a backward on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
