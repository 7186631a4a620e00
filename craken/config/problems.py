"""What can be wrong with a configuration, and how it reads: one line a problem, key path first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One thing wrong: where, what was expected, what came, what to type instead (may be empty)."""

    path: str
    expected: str
    got: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.path}: expected {self.expected}, got {self.got}"
        return f"{line}; {self.hint}" if self.hint else line


def shown(value: Any) -> str:
    """Return `value` as a user would write it in JSON, shortened, with its kind where that helps."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, str):
        return f"the text {text}"
    if isinstance(value, dict):
        return f"the object {text}"
    if isinstance(value, (list, tuple)):
        return f"the list {text}"
    return text


def report(problems: Sequence[Problem], origin: str) -> ValueError:
    """Return the error that names every problem of the configuration that came from `origin` ("" for a dict)."""
    name = f"configuration {origin}" if origin else "configuration"
    if len(problems) == 1:
        return ValueError(f"{name}: {problems[0]}")
    return ValueError("\n".join([f"{name}: {len(problems)} problems", *(f"  {problem}" for problem in problems)]))
