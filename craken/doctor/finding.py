"""One line of the report."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """A thing, whether it works here, and what was found, or the reason and what to do."""

    name: str
    is_ok: bool
    detail: str
