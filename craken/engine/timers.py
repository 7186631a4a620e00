"""Where a step's time goes: forward, backward, step, averaged between two reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from craken.comm import get_accelerator

_nothing: nullcontext[None] = nullcontext()


class PhaseTimers:
    """Adds up the seconds spent in named phases; costs nothing while it is off."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on
        self._seconds: dict[str, float] = {}

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time the block as part of phase `name`; waits for the device at both ends."""
        return self._timed(name) if self.is_on else _nothing

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        accelerator = get_accelerator()
        accelerator.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            accelerator.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def report(self, num_steps: int) -> str:
        """Return milliseconds a step in each phase, and start anew."""
        total = sum(self._seconds.values()) or 1.0
        parts = [
            f"{name} {1000 * seconds / max(num_steps, 1):.1f} ms ({100 * seconds / total:.0f} %)"
            for name, seconds in self._seconds.items()
        ]
        self._seconds = {}
        return "time a step: " + ", ".join(parts)
