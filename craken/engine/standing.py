"""Whether an engine can go on: its states may have left the device, or be partly those of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from craken.zero.parking import Parking


class Standing:
    """What has to be true of an engine's states before it uses them."""

    def __init__(self, parking: Parking) -> None:
        self._parking = parking
        self._torn_by: str | None = None

    def check(self, doing: str) -> None:
        """Raise RuntimeError if states have left the device, or have been filled in part."""
        self._parking.check_empty(doing)
        if self._torn_by is not None:
            raise RuntimeError(f"{doing}: {self._torn_by} failed halfway; load a checkpoint before anything else")

    @contextmanager
    def tearing(self, doing: str) -> Iterator[None]:
        """Fill the states inside of this; after a failure the engine does not go on until they have been filled."""
        self._torn_by = doing
        yield
        self._torn_by = None
