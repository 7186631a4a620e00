"""Modules whose weights come and go as one at stage 3, whatever their children do: marked by the user, read by plans.

For modules that choose among their children by the data, such as experts: ranks that choose differently would otherwise
ask for different weights. Names are DeepSpeed's; a mark is the module's attribute `_z3_leaf`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

Kind = type[nn.Module] | str  # a class, or its name: bare, or with its module's


def set_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[Kind]) -> list[nn.Module]:
    """Mark the modules of these classes, before `initialize`; return them. Raises ValueError if there is none."""
    kinds = list(leaf_module_classes)
    return _set(model, kinds, lambda name, module: any(_is_of(module, kind) for kind in kinds), flag=True)


def unset_z3_leaf_modules(model: nn.Module, leaf_module_classes: Iterable[Kind]) -> list[nn.Module]:
    """Take the mark off the modules of these classes; return them. Raises ValueError if there is none."""
    kinds = list(leaf_module_classes)
    return _set(model, kinds, lambda name, module: any(_is_of(module, kind) for kind in kinds), flag=False)


def set_z3_leaf_modules_by_name(model: nn.Module, module_names: Sequence[str]) -> list[nn.Module]:
    """Mark the modules of these full names; return them. Raises ValueError if there is none."""
    return _set(model, module_names, lambda name, module: name in module_names, flag=True)


def set_z3_leaf_modules_by_suffix(model: nn.Module, suffixes: Sequence[str]) -> list[nn.Module]:
    """Mark the modules whose full names end in these parts; return them. Raises ValueError if there is none."""
    return _set(model, suffixes, lambda name, module: any(_ends_in(name, end) for end in suffixes), flag=True)


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark this one module, or take its mark off."""
    model._z3_leaf = flag  # type: ignore[assignment]


def z3_leaf_module(model: nn.Module) -> bool:
    """Say whether this module is marked."""
    return bool(getattr(model, "_z3_leaf", False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """Return the marked modules of a model."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Say whether a parameter is in a marked module's unit; known once `initialize` has run."""
    return hasattr(model, "ds_z3_leaf_module")


def mark_leaves(model: nn.Module, *, classes: Sequence[str], names: Sequence[str], suffixes: Sequence[str]) -> None:
    """Mark the modules that a config names by class, by full name and by the end of their names."""
    if classes:
        set_z3_leaf_modules(model, classes)
    if names:
        set_z3_leaf_modules_by_name(model, names)
    if suffixes:
        set_z3_leaf_modules_by_suffix(model, suffixes)


def note_leaf_parameters(leaves: Iterable[nn.Module]) -> None:
    """Write on the parameters of marked modules which module's unit they are in."""
    for leaf in leaves:
        for param in leaf.parameters():
            param.ds_z3_leaf_module = leaf  # type: ignore[attr-defined]


def _set(model: nn.Module, wanted: Any, matches: Callable[[str, nn.Module], bool], *, flag: bool) -> list[nn.Module]:
    found = [module for name, module in model.named_modules() if matches(name, module)]
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise ValueError(
            f"leaf modules: expected modules of {list(wanted)} in the model, found none; its modules are of {kinds}"
        )
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _is_of(module: nn.Module, kind: Kind) -> bool:
    if isinstance(kind, str):
        return kind in (type(module).__name__, f"{type(module).__module__}.{type(module).__qualname__}")
    return isinstance(module, kind)


def _ends_in(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix.lstrip("."))
