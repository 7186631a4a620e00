"""The only place that registers hooks: gradients as they come, and the beginning of a backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from craken.zero.group import ShardGroup
from craken.zero.reducer import GradientReducer

_watched: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> the handle of the hook that takes its gradients


def watch_gradients(
    groups: Sequence[ShardGroup], reducer: GradientReducer, grad_factor: Callable[[], float]
) -> list[RemovableHandle]:
    """Have every gradient taken by its group as autograd finishes it; return the handles that undo this.

    `grad_factor`, a method that is held weakly, is asked once a gradient: what it is multiplied by on its way in. A
    parameter that another engine watched is taken over: its gradients can only go to one place.
    """
    factor = WeakMethod(grad_factor)
    handles = []
    for index, group in enumerate(groups):
        for slot, param in enumerate(group.params):
            if param in _watched:
                _watched[param].remove()
            handle = param.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                _taker(reducer, group, index, slot, factor)
            )
            _watched[param] = handle
            handles.append(handle)
    return handles


def _taker(
    reducer: GradientReducer, group: ShardGroup, index: int, slot: int, grad_factor: WeakMethod[Callable[[], float]]
) -> Callable[[Tensor], None]:
    def take(param: Tensor) -> None:
        factor = grad_factor()
        if factor is None:  # the engine is gone: the parameter is the user's again
            return
        reducer.begin_backward()
        grad = param.grad
        if grad is None:  # a custom Function returned None for this parameter
            return
        group.accumulate(slot, grad.detach() if grad.requires_grad else grad, factor())
        param.grad = None
        reducer.gradient_came(index, slot)

    return take


def watch_outputs(outputs: Any, reducer: GradientReducer) -> None:
    """Have `reducer` told when a backward reaches a forward's outputs (see [Note: where a backward ends])."""

    def reached(grad: Tensor) -> None:
        reducer.expect_backward()

    for tensor in tensors_in(outputs):
        if tensor.requires_grad and tensor.grad_fn is not None:
            tensor.register_hook(reached)  # type: ignore[no-untyped-call]


def watch_loading(module: nn.Module, loaded: Callable[[], None]) -> RemovableHandle:
    """Have `loaded`, a method that is held weakly, called after each `module.load_state_dict`."""
    method = WeakMethod(loaded)

    def after(module: nn.Module, incompatible: Any) -> None:
        if (call := method()) is not None:
            call()

    handle: RemovableHandle = module.register_load_state_dict_post_hook(after)  # type: ignore[no-untyped-call]
    return handle


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
