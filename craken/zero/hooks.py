"""The only place that registers hooks: gradients as they come, and the beginning of a backward."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from craken.zero.autograd import tensors_in
from craken.zero.group import ShardGroup
from craken.zero.lifecycle import Lifecycle, Removable
from craken.zero.plans.units import Unit
from craken.zero.reducer import GradientReducer

_watched: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> the handle of the hook that takes its gradients


def watch_gradients(groups: Sequence[ShardGroup], reducer: GradientReducer) -> list[RemovableHandle]:
    """Have every gradient taken by its group as autograd finishes it; return the handles that undo this.

    A parameter that another engine watched is taken over: its gradients can only go to one place.
    """
    handles = []
    for index, group in enumerate(groups):
        for slot, param in enumerate(group.params):
            if param in _watched:
                _watched[param].remove()
            handle = param.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                _taker(reducer, group, index, slot)
            )
            _watched[param] = handle
            handles.append(handle)
    return handles


def _taker(reducer: GradientReducer, group: ShardGroup, index: int, slot: int) -> Callable[[Tensor], None]:
    def take(param: Tensor) -> None:
        if not reducer.is_collecting and not reducer.begin_backward():
            return  # the engine is gone: the parameter is the user's again
        grad = param.grad
        if grad is None:  # a custom Function returned None for this parameter
            return
        param.grad = None  # even if it is refused: the next backward would add to it
        group.gradients.accumulate(slot, grad.detach() if grad.requires_grad else grad, reducer.grad_factor())
        reducer.gradient_came(index, slot)

    return take


def watch_outputs(outputs: Any, reducer: GradientReducer) -> None:
    """Have `reducer` told when a backward reaches a forward's outputs (see [Note: where a backward ends])."""

    def reached(grads: Sequence[Tensor | None]) -> None:
        reducer.expect_backward()

    for tensor in tensors_in(outputs):
        if tensor.grad_fn is not None:
            tensor.grad_fn.register_prehook(reached)  # a tensor's own hook costs twice as much


def watch_loading(module: nn.Module, loaded: Callable[[], None]) -> RemovableHandle:
    """Have `loaded`, a method that is held weakly, called after each `module.load_state_dict`."""
    method = WeakMethod(loaded)

    def after(module: nn.Module, incompatible: Any) -> None:
        if (call := method()) is not None:
            call()

    handle: RemovableHandle = module.register_load_state_dict_post_hook(after)  # type: ignore[no-untyped-call]
    return handle


def not_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Have a compiled model call `hook` as it is, between what is compiled: weights come and go at every run.

    Only if torch's compiler is loaded, as it is with any optimizer: loading it takes 2.5 s.
    """
    if not compiler_is_loaded():
        return hook
    leave_alone: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.compiler.disable
    return leave_alone(hook)


def compiler_is_loaded() -> bool:
    return "torch._dynamo" in sys.modules


def watch_start(module: nn.Module, starts: Callable[[], object]) -> RemovableHandle:
    """Have `starts` called before each forward of `module`, once the weights of its own are there."""
    return module.register_forward_pre_hook(not_compiled(partial(_call, starts)))


def _call(starts: Callable[[], object], module: nn.Module, inputs: tuple[Any, ...]) -> None:
    starts()


def watch_units(units: Sequence[Unit], lifecycle: Lifecycle) -> list[RemovableHandle]:
    """Have the weights of each unit gathered and freed around its forward and backward."""
    handles = []
    for unit in units:
        handles += _watch_unit(unit, lifecycle)
    return handles


def _watch_unit(unit: Unit, lifecycle: Lifecycle) -> list[RemovableHandle]:
    @not_compiled
    def before(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return lifecycle.before_forward(unit, inputs, kwargs) if module is unit.module else None  # no copy of it

    @not_compiled
    def after(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
        return lifecycle.after_forward(unit, outputs) if module is unit.module else None

    return [
        unit.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        unit.module.register_forward_hook(after, always_call=True),
    ]


class _WatchedParameters(dict[str, Any]):
    """A module's parameters by name; tells of each one that is read as an attribute. Copies are ordinary dicts."""

    def __init__(self, params: dict[str, Any], watchers: tuple[Callable[[Any], None], ...]) -> None:
        super().__init__(params)
        self.watchers = watchers

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        for was_read in self.watchers:
            was_read(param)
        return param

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


class AttributeWatch:
    """Watches a module's parameters beside whoever else does."""

    def __init__(self, module: nn.Module, was_read: Callable[[Any], None]) -> None:
        self._module, self._was_read = weakref.ref(module), was_read
        _have_watch(module, (*_watchers_of(module), was_read))

    def remove(self) -> None:
        if (module := self._module()) is not None and self._was_read in (watchers := _watchers_of(module)):
            _have_watch(module, tuple(other for other in watchers if other != self._was_read))


def _watchers_of(module: nn.Module) -> tuple[Callable[[Any], None], ...]:
    """Return what is called when parameters are read as attributes of `module`."""
    params = module._parameters
    return params.watchers if isinstance(params, _WatchedParameters) else ()


def _have_watch(module: nn.Module, watchers: tuple[Callable[[Any], None], ...]) -> None:
    params = dict(module._parameters)
    object.__setattr__(module, "_parameters", _WatchedParameters(params, watchers) if watchers else params)


def watch_attributes(module: nn.Module, was_read: Callable[[Any], None]) -> AttributeWatch:
    """Have `was_read` called with each parameter that is read as an attribute of `module`, before it is handed out."""
    return AttributeWatch(module, was_read)


def unwatch_attributes(model: nn.Module) -> None:
    """End all watching of a model's parameters."""
    for module in model.modules():
        if _watchers_of(module):
            _have_watch(module, ())


def watch_reads(model: nn.Module, groups: Sequence[ShardGroup], lifecycle: Lifecycle) -> list[Removable]:
    """Have weights gathered that a forward reads outside of their owner (tied heads, fused losses, adapters).

    Modules that are given such a weight later are watched too.
    """
    group_of = {id(param): group for group in groups for param in group.params}

    @not_compiled
    def was_read(param: Any) -> None:
        group = group_of.get(id(param))
        if group is not None and lifecycle.is_running():
            lifecycle.read_in_forward(group)

    watching: list[Removable] = [
        watch_attributes(module, was_read)
        for module in model.modules()
        if any(id(param) in group_of for param in module._parameters.values())
    ]
    return [*watching, _Newcomers(group_of, was_read)]


class _Newcomers:
    """Watches modules that are given one of the parameters after the watching began."""

    def __init__(self, group_of: Mapping[int, ShardGroup], was_read: Callable[[Any], None]) -> None:
        self._group_of, self._was_read = group_of, was_read
        self._watching: list[AttributeWatch] = []
        # torch calls this for every module of the process, so it must keep nothing alive
        self._handle = register_module_parameter_registration_hook(partial(_was_given, weakref.ref(self)))
        weakref.finalize(self, self._handle.remove)

    def was_given(self, module: nn.Module, param: Any) -> None:
        if id(param) in self._group_of and self._was_read not in _watchers_of(module):
            self._watching.append(watch_attributes(module, self._was_read))

    def remove(self) -> None:
        self._handle.remove()
        for watch in self._watching:
            watch.remove()
        self._watching = []


def _was_given(newcomers: weakref.ref[_Newcomers], module: nn.Module, name: str, param: Any) -> None:
    if (alive := newcomers()) is not None:
        alive.was_given(module, param)
