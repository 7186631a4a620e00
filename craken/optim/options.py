"""Checks the `params` of a config section against the options a builder knows, before anything is built."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

REQUIRED: Final = inspect.Parameter.empty


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known word closest to `word`, or an empty string when none is close."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean '{by_lower[close[0]]}'?)" if close else ""


def signature_defaults(constructor: Callable[..., object]) -> dict[str, Any]:
    """Return the options of `constructor` after its first argument, each with its default or `REQUIRED`."""
    options = list(inspect.signature(constructor).parameters.values())[1:]
    return {option.name: option.default for option in options}


def check_options(
    given: Mapping[str, Any], defaults: Mapping[str, Any], *, where: str, may_list_numbers: bool = False
) -> dict[str, Any]:
    """Return `given` with lists turned into tuples; `ValueError` with the full path of a key that does not fit.

    `where` is the path of the section, such as `optimizer.params`. A default tells what its option may be: a boolean,
    a finite number (or a list of them, one a parameter group, if `may_list_numbers`), a string, a tuple of as many
    values. Options whose default is None or missing are checked by whoever takes them.
    """
    for key in given:
        if key not in defaults:
            known = ", ".join(sorted(defaults))
            raise ValueError(f"{where}.{key} is no known option{nearest(key, defaults)}; known here: {known}")
    missing = [key for key, default in defaults.items() if default is REQUIRED and key not in given]
    if missing:
        raise ValueError(f"{where}.{missing[0]} is required and missing: add it to the section")
    checked = {}
    for key, value in given.items():
        is_listed = may_list_numbers and isinstance(value, (list, tuple)) and all(map(_is_number, value))
        checked[key] = value if is_listed else _checked(value, defaults[key], f"{where}.{key}")
    return checked


def _checked(value: Any, default: Any, path: str) -> Any:
    if value == "auto":
        raise ValueError(f"{path} is 'auto', which only a client that fills it in can use: give a value")
    if isinstance(default, bool):
        expected, fits = "true or false", isinstance(value, bool)
    elif default is not REQUIRED and isinstance(default, (int, float)):
        expected, fits = "a finite number", _is_number(value)
    elif isinstance(default, str):
        expected, fits = "a string", isinstance(value, str)
    elif isinstance(default, tuple):
        expected = f"a list of {len(default)} numbers"
        fits = isinstance(value, (list, tuple)) and len(value) == len(default) and _fit_each(value, default)
        value = tuple(value) if fits else value
    else:
        return tuple(value) if isinstance(value, list) else value
    if not fits:
        raise ValueError(f"{path} must be {expected}, got {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _fit_each(values: Iterable[Any], defaults: Iterable[Any]) -> bool:
    return all(
        _is_number(value) or (value is None and default is None)
        for value, default in zip(values, defaults, strict=True)
    )


def check_rates(*, lr: float, weight_decay: float, betas: tuple[float, ...] = (), eps: float = 0.0) -> None:
    """Raise `ValueError` for hyperparameters that no optimizer can run with."""
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value!r}")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must each lie in [0, 1), got {betas!r}")
