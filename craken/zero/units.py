"""Plans which modules bring their weights together at stage 3: the model's repeated blocks, and what lies around them.

    model                      unit: nothing of its own, but forwards run inside of it
      embed                    unit
      layers.0 ... layers.11   a unit each (a block: one of several of a kind, in a list or named in _no_split_modules)
      norm, head               a unit each

A block over the budget is split at its children, and so on down. Units are what is whole at once: gathered before their
module's forward and backward, freed after.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Unit:
    """A module and the parameters that come and go with it, by their full names; each parameter is in one unit."""

    name: str
    module: nn.Module
    params: tuple[tuple[str, nn.Parameter], ...]


def plan_units(model: nn.Module, *, max_numel: int, leaves: Collection[nn.Module] = ()) -> list[Unit]:
    """Return the units in the order of `model.named_modules()`, the root first (with the parameters of its own).

    max_numel: what a unit should not exceed, in elements. leaves: modules that are never split, whatever their size. A
    tied parameter belongs to the first unit that holds it.
    """
    planner = _Planner(model, max_numel, frozenset(id(leaf) for leaf in leaves))
    return list(planner.units("", model, is_root=True))


class _Planner:
    def __init__(self, model: nn.Module, max_numel: int, leaves: frozenset[int]) -> None:
        self._names = {id(param): name for name, param in model.named_parameters()}
        self._max_numel, self._leaves = max_numel, leaves
        self._block_names = _no_split_names(model)
        self._taken: set[int] = set()

    def units(self, name: str, module: nn.Module, *, is_root: bool = False, is_block: bool = False) -> Iterator[Unit]:
        is_leaf = id(module) in self._leaves
        is_block = is_block or type(module).__name__ in self._block_names
        if not is_root and (is_leaf or (is_block and _numel(module) <= self._max_numel)):
            yield from self._unit(name, module, recurse=True)
            return
        yield from self._unit(name, module, recurse=False, is_root=is_root)
        repeats = isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_repeated(module)
        for child_name, child in module.named_children():
            yield from self.units(f"{name}.{child_name}" if name else child_name, child, is_block=repeats)

    def _unit(self, name: str, module: nn.Module, *, recurse: bool, is_root: bool = False) -> Iterator[Unit]:
        params = []
        for param in module.parameters(recurse):
            if id(param) not in self._taken:
                self._taken.add(id(param))
                params.append((self._names[id(param)], param))
        if params or is_root:
            yield Unit(name, module, tuple(params))


def _no_split_names(model: nn.Module) -> set[str]:
    """Return the class names that Hugging Face models declare as blocks, on whichever module of the model says so."""
    names: set[str] = set()
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return names


def _is_repeated(container: nn.Module) -> bool:
    """Say whether a container holds several modules of one kind that have children: blocks, not a chain of layers."""
    children = list(container.children())
    return len(children) > 1 and len({type(child) for child in children}) == 1 and any(children[0].children())


def _numel(module: nn.Module) -> int:
    return sum(whole_numel(param) for param in module.parameters())


def whole_numel(param: nn.Parameter) -> int:
    """Return a parameter's elements, of which it may show none now."""
    return int(getattr(param, "ds_numel", 0)) or param.numel()
