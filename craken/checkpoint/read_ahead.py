"""Fetches small ranges of files in a store a window at a time, since a request costs more than the bytes beside.

A step count or a norm's weight is some bytes to some kilobytes, thousands of them lie side by side, and a round trip
takes as long as a megabyte does. So a small range brings what follows it in the file; the next ones come from there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

WINDOW_BYTES = 1 << 20  # at most
_TOTAL_BYTES = 32 << 20


class _Window(NamedTuple):
    """Bytes of a file from `start` on."""

    start: int
    data: bytes


class ReadAhead:
    """The latest window of each file of a checkpoint, for files that do not change; used by several threads."""

    def __init__(self, num_files: int) -> None:
        """Files are read side by side, those of all ranks that saved: they share the memory there is."""
        self._window_bytes = min(_TOTAL_BYTES // max(num_files, 1), WINDOW_BYTES)
        self._windows: dict[str, _Window] = {}
        self._lock = threading.Lock()

    def read(self, file: str, start: int, num_bytes: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Return bytes [start, start + num_bytes) of `file`, fewer at its end; `fetch(start, end)` asks the store."""
        if num_bytes > self._window_bytes // 4:
            return fetch(start, start + num_bytes)
        with self._lock:
            window = self._windows.get(file, _Window(0, b""))
            if not window.start <= start <= start + num_bytes <= window.start + len(window.data):
                self._windows[file] = window = _Window(start, fetch(start, start + self._window_bytes))
        return window.data[start - window.start :][:num_bytes]
