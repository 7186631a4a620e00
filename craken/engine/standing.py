"""Whether an engine can go on: it may have ended, or its states left the device, or be partly those of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from craken.zero.parking import Parking


class Standing:
    """What has to be true of an engine's states before it uses them."""

    def __init__(self, parking: Parking) -> None:
        self._parking = parking
        self._torn_by: str | None = None
        self._has_ended = False

    def end(self) -> None:
        """Note that the weights will not be gathered any more."""
        self._has_ended = True

    def check(self, doing: str) -> None:
        """Raise RuntimeError if the engine has ended, or states have left the device or been filled in part."""
        if self._has_ended:
            raise RuntimeError(
                f"{doing}: this engine was destroyed (accelerate's free_memory() does that, and so does a Trainer that "
                "begins to train after it evaluated); give engine.module to initialize() or to a new Trainer"
            )
        self._parking.check_empty(doing)
        if self._torn_by is not None:
            raise RuntimeError(f"{doing}: {self._torn_by} failed halfway; load a checkpoint before anything else")

    @contextmanager
    def tearing(self, doing: str) -> Iterator[None]:
        """Fill the states inside of this; after a failure the engine does not go on until they have been filled."""
        self._torn_by = doing
        yield
        self._torn_by = None
