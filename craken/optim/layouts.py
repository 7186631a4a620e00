"""Knows which optimizers work on fragments of parameters, and finds it out for those it has never seen."""

from __future__ import annotations

import inspect
from enum import Enum, auto
from typing import Any

from torch import optim
from torch.optim import Optimizer

from craken.optim.first_step import StateStarter
from craken.optim.lion import Lion
from craken.optim.muon import Muon
from craken.optim.probe import survives_cutting


class Layout(Enum):
    """How an optimizer's parameters may lie across ranks."""

    PACKED = auto()  # end to end, cut anywhere: any elementwise cut of the flattened tensor gives the same result
    WHOLE = auto()  # each parameter entire on one rank


_ELEMENTWISE: frozenset[type[Optimizer]] = frozenset(
    {
        optim.ASGD,
        optim.Adadelta,
        optim.Adagrad,
        optim.Adam,
        optim.AdamW,
        optim.Adamax,
        optim.NAdam,
        optim.RAdam,
        optim.RMSprop,
        optim.Rprop,
        optim.SGD,
        Lion,
    }
)
_MATRIX: frozenset[type[Optimizer]] = frozenset({optim.Adafactor, optim.Muon})
_UNSTEPPABLE: dict[type[Optimizer], str] = {
    optim.LBFGS: "its step() runs the model several times through a closure, over all parameters at once",
    optim.SparseAdam: "it takes sparse gradients only, and gradients are dense here",
}


def param_layouts(optimizer: Optimizer) -> list[list[Layout]]:
    """Return the layout of every parameter, aligned with `optimizer.param_groups[i]["params"]`.

    An unknown class is tried out on a small matrix, whole and cut in two. `ValueError` names an optimizer that can't
    be stepped here at all.
    """
    refuse_unsteppable(type(optimizer))
    if isinstance(optimizer, Muon):
        return [_all(group, Layout.WHOLE if group["use_muon"] else Layout.PACKED) for group in optimizer.param_groups]
    layout = _layout_of(optimizer)
    return [_all(group, layout) for group in optimizer.param_groups]


def can_step_in_chunks(optimizer: Optimizer) -> bool:
    """Say whether stepping disjoint sets of fragments one after another is the same as stepping them together.

    Not where the user hooked into `step()`: those hooks expect one call a step.
    """
    hooks = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    return _known_elementwise(type(optimizer)) and all(isinstance(hook, StateStarter) for hook in hooks)


def is_steppable(optimizer_class: type[Optimizer]) -> bool:
    """Say whether the engine's step can drive this class: dense gradients in, no closure."""
    return not issubclass(optimizer_class, tuple(_UNSTEPPABLE))


def refuse_unsteppable(optimizer_class: type[Optimizer]) -> None:
    """Raise `ValueError` for an optimizer class that the engine's step can't drive."""
    for known, reason in _UNSTEPPABLE.items():
        if issubclass(optimizer_class, known):
            raise ValueError(
                f"optimizer {optimizer_class.__name__} can't be used: {reason}. Use AdamW, SGD, Muon or another "
                "first-order optimizer"
            )


def _layout_of(optimizer: Optimizer) -> Layout:
    kind = type(optimizer)
    if _known_elementwise(kind) or hasattr(optimizer, "sum_over_shards"):
        return Layout.PACKED
    if kind in _MATRIX:
        return Layout.WHOLE
    return Layout.PACKED if survives_cutting(optimizer) else Layout.WHOLE


def _known_elementwise(kind: type[Optimizer]) -> bool:
    """Say whether `kind` is a known class, or a subclass that leaves its `step` alone (torch wraps both, at will)."""
    return any(
        issubclass(kind, known) and inspect.unwrap(kind.step) is inspect.unwrap(known.step) for known in _ELEMENTWISE
    )


def _all(group: dict[str, Any], layout: Layout) -> list[Layout]:
    return [layout] * len(group["params"])
