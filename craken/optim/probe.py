"""Tries an optimizer of an unknown class on a small matrix, whole and cut in two, to see whether the cut shows.

A throw-away instance of the same class with the same hyperparameters takes three steps over a matrix, a second one
over the two pieces of the same matrix, flattened. Equal results: no element's update depends on its neighbours. The
gradients are fixed figures, and neither the user's tensors nor the random state are touched.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from craken.log import warn_once

_T = TypeVar("_T")
_ROWS, _COLS = 96, 129  # more than 4096 elements: below that, 8-bit optimizers keep 32-bit states
_CUT = 5003  # neither a row's end nor a multiple of a quantization block
_STEPS = 3
_TOLERANCE: Final = 1e-6
# What an optimizer's own code may raise over shapes, options or gradients it does not take.
_REFUSALS: Final = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError)


def survives_cutting(optimizer: Optimizer) -> bool:
    """Say whether steps over a cut, flattened matrix give what steps over the matrix give.

    `ValueError` when `step()` can't do without a closure. False, with a warning, when no instance can be made to try.
    """
    name = type(optimizer).__name__
    if _needs_closure(optimizer):
        raise ValueError(
            f"optimizer {name} needs a closure in step(), and the engine calls step() without one: "
            "use an optimizer that steps from the gradients alone, such as AdamW"
        )
    device = _device_of(optimizer)
    start, grads = _figures(0, device), [_figures(step, device) for step in range(1, _STEPS + 1)]
    with torch.enable_grad(), _untouched_random_state(device):
        whole = _attempt(lambda: _run(optimizer, [start], [[grad] for grad in grads]))
        if isinstance(whole, Exception):
            warn_once(
                f"optimizer {name} could not be tried out on a small matrix ({whole}); its parameters are kept whole, "
                "one rank each"
            )
            return False
        cut = _attempt(lambda: _run(optimizer, _pieces(start), [_pieces(grad) for grad in grads]))
    if isinstance(cut, Exception):
        return False
    return bool(torch.allclose(whole, cut, rtol=_TOLERANCE, atol=_TOLERANCE))


def state_dtypes(optimizer: Optimizer) -> dict[str, torch.dtype]:
    """Return the dtype of each state that has the shape of its parameter, by key; nothing if that can't be tried."""

    def states() -> dict[str, torch.dtype]:
        param = Parameter(torch.zeros(_COLS))
        param.grad = torch.ones(_COLS)
        instance = _instance_like(optimizer, [param])
        instance.step()
        found = instance.state.get(param, {}).items()
        return {key: value.dtype for key, value in found if isinstance(value, Tensor) and value.shape == param.shape}

    with torch.enable_grad(), _untouched_random_state(torch.device("cpu")):
        found = _attempt(states)
    return {} if isinstance(found, Exception) else found


def _needs_closure(optimizer: Optimizer) -> bool:
    parameters = inspect.signature(optimizer.step).parameters.values()
    return any(p.name == "closure" and p.default is inspect.Parameter.empty for p in parameters)


def _device_of(optimizer: Optimizer) -> torch.device:
    for group in optimizer.param_groups:
        for param in group["params"]:
            device: torch.device = param.device
            return torch.device("cpu") if device.type == "meta" else device
    return torch.device("cpu")


def _figures(seed: int, device: torch.device) -> Tensor:
    """Return a fixed matrix of irregular values in (-1, 1), no two `seed`s alike. [96, 129]."""
    places = torch.arange(_ROWS * _COLS, dtype=torch.float64)
    return torch.sin(places * places * 0.37 + seed).float().view(_ROWS, _COLS).to(device)


def _pieces(matrix: Tensor) -> list[Tensor]:
    flat = matrix.flatten()
    return [flat[:_CUT], flat[_CUT:]]


def _attempt(run: Callable[[], _T]) -> _T | Exception:
    try:
        return run()
    except _REFUSALS as error:
        return error


def _run(optimizer: Optimizer, start: list[Tensor], grads_per_step: list[list[Tensor]]) -> Tensor:
    """Step a fresh instance over copies of `start`; return where its parameters end, flattened into one vector."""
    params = [Parameter(piece.clone()) for piece in start]
    instance = _instance_like(optimizer, params)
    for grads in grads_per_step:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        instance.step()
    return torch.cat([param.detach().flatten() for param in params])


def _instance_like(optimizer: Optimizer, params: list[Parameter]) -> Optimizer:
    """Construct the same class with the first group's options, values that are tensors copied."""
    group = next((g for g in optimizer.param_groups if g["params"]), optimizer.param_groups[0])
    options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    accepted = inspect.signature(type(optimizer)).parameters
    given = {key: value for key, value in {**optimizer.defaults, **options}.items() if key in accepted}
    construct: Any = type(optimizer)
    instance: Optimizer = construct([{**options, "params": params}], **copy.deepcopy(given))
    set_training = getattr(instance, "train", None)  # schedule-free optimizers refuse to step before it
    if callable(set_training):
        set_training()
    return instance


@contextmanager
def _untouched_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
