"""What a construction watch tells, and what it leaves behind."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from craken.zero.building.wrapping import ConstructionWatch


class Base(nn.Module):
    def __init__(self, width: int, *, bias: bool = True) -> None:
        """Make one layer."""
        super().__init__()
        self.layer = nn.Linear(width, width, bias=bias)


class Derived(Base):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(width))


class Silent(Derived):
    """Has no constructor of its own."""


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        raise KeyError("no")


def watched() -> tuple[ConstructionWatch, list[str]]:
    names: list[str] = []
    return ConstructionWatch(lambda module: names.append(type(module).__name__)), names


def test_each_module_is_told_once_when_all_of_its_constructors_have_returned() -> None:
    watch, names = watched()
    watch.start()
    try:
        module = Derived()
        Silent()
    finally:
        watch.stop()
    Derived()
    assert names == ["Linear", "Derived", "Linear", "Silent"]
    assert type(module) is Derived


def test_classes_that_are_defined_meanwhile_are_told_too_and_their_hooks_run() -> None:
    seen: list[Any] = []

    class Hooked(nn.Module):
        def __init_subclass__(cls, kind: str = "", **options: Any) -> None:
            super().__init_subclass__(**options)
            seen.append((cls.__name__, kind))

    watch, names = watched()
    watch.start()
    try:

        class Inside(Hooked, kind="new"):
            def __init__(self, a: int = 1) -> None:
                super().__init__()

        Inside()
    finally:
        watch.stop()
    Inside()
    assert names == ["Inside"]
    assert seen == [("Inside", "new")]


def test_signatures_and_names_stay() -> None:
    watch, _ = watched()
    before = (
        inspect.signature(Base.__init__),
        inspect.signature(Base),
        Base.__init__.__doc__,
        Base.__init__.__qualname__,
    )
    watch.start()
    try:
        assert before == (
            inspect.signature(Base.__init__),
            inspect.signature(Base),
            Base.__init__.__doc__,
            Base.__init__.__qualname__,
        )
        assert "bias" in inspect.signature(Base.__init__).parameters
    finally:
        watch.stop()


def test_everything_is_put_back_after_an_exception_too() -> None:
    watch, names = watched()
    classes = [nn.Linear, Base, Derived, Silent, Failing, nn.Module]
    before = [(cls.__dict__.get("__init__"), cls.__dict__.get("__init_subclass__")) for cls in classes]
    watch.start()
    with pytest.raises(KeyError):
        Failing()
    Base(2)  # an object may have the address of the one that failed
    watch.stop()
    assert names == ["Linear", "Linear", "Base"]
    assert before == [(cls.__dict__.get("__init__"), cls.__dict__.get("__init_subclass__")) for cls in classes]
    assert "__init_subclass__" not in nn.Module.__dict__


def test_what_another_has_replaced_meanwhile_is_left_to_him() -> None:
    watch, names = watched()
    original = Base.__init__
    watch.start()
    ours = Base.__init__

    def theirs(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        ours(module, *args, **kwargs)

    Base.__init__ = theirs
    try:
        watch.stop()
        assert Base.__init__ is theirs
        Base(2)
        assert names == []
    finally:
        Base.__init__ = original


def test_a_paused_watch_tells_nothing() -> None:
    watch, names = watched()
    watch.start()
    try:
        watch.is_paused = True
        Base(2)
        watch.is_paused = False
        nn.Linear(2, 2)
    finally:
        watch.stop()
    assert names == ["Linear"]
