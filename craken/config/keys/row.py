"""One row of the table of known keys."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple


class Status(Enum):
    """What a key does in Craken."""

    WORKS = "works"
    ALWAYS = "always so"
    STAGE_3 = "read at stage 3 only"
    OFFLOAD = "read by offload only"
    LATER = "no effect yet"
    NO_EFFECT = "no effect"


class KnownKey(NamedTuple):
    """A key that may stand in a configuration: its path, what it does here, a value to show, whose alias it is."""

    path: str
    status: Status
    sample: Any
    does: str
    alias_of: str = ""


def rows(section: str, *entries: tuple[str, Status, Any, str] | tuple[str, Status, Any, str, str]) -> list[KnownKey]:
    """Return the rows of `section` ("" is the top level); an entry's fifth field is the name it is an alias of."""
    prefix = f"{section}." if section else ""
    found = []
    for name, status, sample, does, *alias in entries:
        found.append(KnownKey(prefix + name, status, sample, does, prefix + alias[0] if alias else ""))
    return found


def section(path: str, status: Status, does: str, **samples: Any) -> list[KnownKey]:
    """Return the row of the section at `path` and one a key in it; the keys share its status and meaning."""
    keys = [KnownKey(f"{path}.{name}", status, sample, does) for name, sample in samples.items()]
    return [KnownKey(path, status, dict(samples), does), *keys]
