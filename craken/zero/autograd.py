"""Small questions about autograd: which tensors a value holds, and whether a backward runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_DEPTH = 8  # a model's output > its cache > its layers > a layer > its keys is 5
_OPAQUE = (str, bytes, int, float, complex, type(None), type, FunctionType, MethodType, ModuleType, nn.Module)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts, dataclasses and attributes of objects; each object once."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, _OPAQUE):
        yield from _inner_tensors(value, _DEPTH, set())


def _inner_tensors(value: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth > 0 and not isinstance(value, _OPAQUE) and id(value) not in seen:
        seen.add(id(value))
        for inner in _children(value):
            yield from _inner_tensors(inner, depth - 1, seen)


def _children(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return list(_attributes(value).values())


def _attributes(value: Any) -> dict[str, Any]:
    named = dict(getattr(value, "__dict__", None) or {})
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                named[name] = getattr(value, name)
    return named


def map_tensors(value: Any, change: Callable[[Tensor], Tensor], depth: int = _DEPTH) -> Any:
    """Return `value` with `change` applied to the tensors that `tensors_in` finds; containers are copied, not written.

    Parts without a changed tensor are the same objects.
    """
    if isinstance(value, Tensor):
        return change(value)
    if depth == 0 or isinstance(value, _OPAQUE):
        return value
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change, depth - 1) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    named = value if isinstance(value, dict) else _attributes(value)
    changed = {name: new for name, old in named.items() if (new := map_tensors(old, change, depth - 1)) is not old}
    if not changed:
        return value
    replaced = copy.copy(value)
    for name, new in changed.items():
        if isinstance(value, dict):
            replaced[name] = new
        else:
            object.__setattr__(replaced, name, new)  # frozen dataclasses too
    return replaced


def is_in_backward() -> bool:
    """Say whether autograd is running a backward on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)
