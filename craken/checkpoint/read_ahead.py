"""Fetches small ranges of files in a store a window at a time, since a request costs more than the bytes beside.

A step count or a norm's weight is some bytes to some kilobytes, thousands of them lie side by side, and a round trip
takes as long as a megabyte does. So a small range brings what follows it in the file; the next ones come from there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

WINDOW_BYTES = 1 << 20
_NUM_WINDOWS = 32  # files read side by side, such as those of all ranks that saved


class _Window(NamedTuple):
    """Bytes of a file from `start` on."""

    start: int
    data: bytes


class ReadAhead:
    """The latest window of each of the files read last, for files that do not change; used by several threads."""

    def __init__(self) -> None:
        self._windows: OrderedDict[str, _Window] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: str, start: int, num_bytes: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Return bytes [start, start + num_bytes) of `file`, fewer at its end; `fetch(start, end)` asks the store."""
        if num_bytes > WINDOW_BYTES // 4:
            return fetch(start, start + num_bytes)
        with self._lock:
            window = self._windows.pop(file, _Window(0, b""))
            if not window.start <= start <= start + num_bytes <= window.start + len(window.data):
                window = _Window(start, fetch(start, start + WINDOW_BYTES))
            self._windows[file] = window
            if len(self._windows) > _NUM_WINDOWS:
                self._windows.popitem(last=False)
        return window.data[start - window.start :][:num_bytes]
