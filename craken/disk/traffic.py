"""Counts bytes to and from the disk, and the seconds in which at least one of them was on its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Traffic:
    """Bytes moved and the time the disk was busy with them; subtract an earlier one for what lies between."""

    read_bytes: int = 0
    read_s: float = 0.0
    written_bytes: int = 0
    write_s: float = 0.0
    busy_s: float = 0.0  # either way: less than both together when reads and writes overlap

    @property
    def read_bytes_per_s(self) -> float:
        return self.read_bytes / self.read_s if self.read_s else 0.0

    @property
    def written_bytes_per_s(self) -> float:
        return self.written_bytes / self.write_s if self.write_s else 0.0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(
            self.read_bytes - earlier.read_bytes,
            self.read_s - earlier.read_s,
            self.written_bytes - earlier.written_bytes,
            self.write_s - earlier.write_s,
            self.busy_s - earlier.busy_s,
        )


@dataclass
class Meter:
    """One direction's count, kept by the threads that move the bytes: calls that overlap count their time once."""

    num_bytes: int = 0
    _busy_s: float = 0.0
    _num_moving: int = 0
    _since_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def moving(self, num_bytes: int) -> Iterator[None]:
        """Count the block as time, and `num_bytes` unless it raises."""
        with self._lock:
            if self._num_moving == 0:
                self._since_s = time.perf_counter()
            self._num_moving += 1
        moved = 0
        try:
            yield
            moved = num_bytes
        finally:
            with self._lock:
                self.num_bytes += moved
                self._num_moving -= 1
                if self._num_moving == 0:
                    self._busy_s += time.perf_counter() - self._since_s

    @property
    def busy_s(self) -> float:
        with self._lock:
            return self._busy_s + (time.perf_counter() - self._since_s if self._num_moving else 0.0)
