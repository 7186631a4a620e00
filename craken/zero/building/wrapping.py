"""Tells when a module of any class has been built: constructors are replaced for a while, then put back.

    class Block(nn.Module):             Block(...)
        def __init__(self):               outermost constructor of the block
            super().__init__()              another of the same object: passed through
            self.up = nn.Linear(4, 4)       outermost of `up`; returns -> built(up)
                                          returns -> built(block)

Only `__init__` is replaced, in classes that define one: identity, signature and hooks of a class stay what they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn


class _Replaced(NamedTuple):
    owner: type
    name: str
    original: Any  # None: the class had none of its own
    replacement: Any


class ConstructionWatch:
    """Calls `built(module)` when the outermost constructor of a module has returned, between `start` and `stop`."""

    def __init__(self, built: Callable[[nn.Module], None]) -> None:
        self._built = built
        self._replaced: list[_Replaced] = []
        self._under_construction: set[int] = set()
        self.is_paused = False

    @property
    def depth(self) -> int:
        """How many constructors run, one inside of the other."""
        return len(self._under_construction)

    def start(self) -> None:
        for owner in _subclasses(nn.Module):
            self._watch(owner)
        self._watch_subclasses()

    def _watch_subclasses(self) -> None:
        own = nn.Module.__dict__.get("__init_subclass__")

        def begin_subclass(cls: type[Any], /, **options: Any) -> None:
            if own is None:
                super(nn.Module, cls).__init_subclass__(**options)  # type: ignore[misc]
            else:
                own.__get__(None, cls)(**options)
            self._watch(cls)

        self.replace(nn.Module, "__init_subclass__", classmethod(begin_subclass))

    def stop(self) -> None:
        """Put everything back, but for what somebody else has replaced meanwhile."""
        while self._replaced:
            owner, name, original, replacement = self._replaced.pop()
            if owner.__dict__.get(name) is not replacement:
                continue
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._under_construction.clear()
        self.is_paused = True  # replacements that could not be put back call their originals

    def replace(self, owner: type, name: str, replacement: Any) -> None:
        """Put `replacement` in place of a class's attribute until `stop`."""
        self._replaced.append(_Replaced(owner, name, owner.__dict__.get(name), replacement))
        setattr(owner, name, replacement)

    def _watch(self, owner: type[nn.Module]) -> None:
        original = owner.__dict__.get("__init__")
        if original is None:
            return

        @functools.wraps(original)
        def construct(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if self.is_paused or id(module) in self._under_construction:
                original(module, *args, **kwargs)
                return
            self._under_construction.add(id(module))
            try:
                original(module, *args, **kwargs)
            finally:
                self._under_construction.discard(id(module))
            self._built(module)

        self.replace(owner, "__init__", construct)


def _subclasses(root: type[nn.Module]) -> Iterator[type[nn.Module]]:
    seen: set[type] = set()
    waiting = [root]
    while waiting:
        for subclass in waiting.pop().__subclasses__():
            if subclass not in seen:
                seen.add(subclass)
                waiting.append(subclass)
                yield subclass
