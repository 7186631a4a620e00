"""Plans which modules bring their weights together at stage 3: the model's repeated blocks, and what lies around them.

    model, model.encoder       units: they may own nothing, but forwards run inside and read weights
      embed                    unit
      layers.0 ... layers.11   a unit each (a block: one of several of a kind, in a list or named in _no_split_modules)
      norm, head               a unit each

A block over the budget is split at its children, and so on down; modules that the user marks (leaves.py), and modules
of many small layers if asked, are not. Units are what is whole at once: gathered before their module's forward and
backward, freed after.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Unit:
    """A module and the parameters that come and go with it, by their full names; each parameter is in one unit."""

    name: str
    module: nn.Module
    params: tuple[tuple[str, nn.Parameter], ...]


def plan_units(
    model: nn.Module, *, max_numel: int, leaves: Collection[nn.Module] = (), small_layer_numel: int = 0
) -> list[Unit]:
    """Return the units in the order of `model.named_modules()`, the root first (with the parameters of its own).

    max_numel: what a unit should not exceed, in elements. leaves: modules that are never split, whatever their size;
    so are modules whose layers have at most `small_layer_numel` elements on average. A tied parameter belongs to the
    first unit that holds it.
    """
    planner = _Planner(model, max_numel, frozenset(id(leaf) for leaf in leaves), small_layer_numel)
    return list(planner.units("", model, is_root=True))


def choose_persistent(params: Iterable[nn.Parameter], *, max_numel: int, max_total: int) -> set[int]:
    """Return the ids of parameters that stay whole: of at most `max_numel` elements, smallest first to `max_total`."""
    chosen, total = set(), 0
    for param in sorted(params, key=whole_numel):
        total += whole_numel(param)
        if whole_numel(param) > max_numel or total > max_total:
            break
        chosen.add(id(param))
    return chosen


class _Planner:
    def __init__(self, model: nn.Module, max_numel: int, leaves: frozenset[int], small_layer_numel: int) -> None:
        self._names = {id(param): name for name, param in model.named_parameters()}
        self._max_numel, self._leaves, self._small_layer_numel = max_numel, leaves, small_layer_numel
        self._block_names = _no_split_names(model)
        self._taken: set[int] = set()

    def units(self, name: str, module: nn.Module, *, is_root: bool = False, is_block: bool = False) -> Iterator[Unit]:
        is_block = is_block or type(module).__name__ in self._block_names
        fits = is_block and _has_forward(module) and _numel(module) <= self._max_numel
        if not is_root and (self._is_leaf(name, module) or fits):
            yield from self._unit(name, module, recurse=True)
            return
        runs_others = any(module.children()) and _has_forward(module)
        yield from self._unit(name, module, recurse=False, may_be_empty=is_root or runs_others)
        repeats = isinstance(module, (nn.ModuleList, nn.Sequential)) and _is_repeated(module)
        repeats = repeats or (is_block and not _has_forward(module))  # a block that is a list of its parts
        for child_name, child in module.named_children():
            yield from self.units(f"{name}.{child_name}" if name else child_name, child, is_block=repeats)

    def _is_leaf(self, name: str, module: nn.Module) -> bool:
        if id(module) not in self._leaves:
            return _has_forward(module) and self._has_small_layers(module)
        if not _has_forward(module):
            raise ValueError(
                f"leaf modules: {name} is a {type(module).__name__}, which never runs itself; expected the module that "
                "runs what is in it: mark that one"
            )
        return True

    def _has_small_layers(self, module: nn.Module) -> bool:
        num_layers = sum(any(True for _ in layer.parameters(recurse=False)) for layer in module.modules())
        return num_layers > 1 and _numel(module) <= self._small_layer_numel * num_layers

    def _unit(self, name: str, module: nn.Module, *, recurse: bool, may_be_empty: bool = False) -> Iterator[Unit]:
        params = []
        for param in module.parameters(recurse):
            if id(param) not in self._taken:
                self._taken.add(id(param))
                params.append((self._names[id(param)], param))
        if params or may_be_empty:
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


def _has_forward(module: nn.Module) -> bool:
    """Say whether a module can run itself; lists and other mere holders of modules cannot."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _numel(module: nn.Module) -> int:
    return sum(whole_numel(param) for param in module.parameters())


def whole_numel(param: nn.Parameter) -> int:
    """Return a parameter's elements, of which it may show none now."""
    return int(getattr(param, "ds_numel", 0)) or param.numel()
