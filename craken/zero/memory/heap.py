"""How the host's C library treats freed memory: kept for the next step, or given back to the system at once.

while weights move in   tensors of 4 MB are freed between small objects that stay: kept, their memory is cut up and
                        the next tensors take new memory. Twice a model's size was left over of building it.
while training          the same sizes come and go each step: kept, they fit again
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class _Habit(NamedTuple):
    """Blocks from `mapped` bytes on are mappings of their own, gone when freed; `trimmed` free bytes on top go too."""

    mapped: int
    trimmed: int


_KEEPING = _Habit(mapped=32 << 20, trimmed=1 << 30)  # glibc takes no more than 32 MiB on 64-bit machines
_RETURNING = _Habit(mapped=128 << 10, trimmed=128 << 10)  # what glibc begins with, before it adapts


class _Heap:
    """The process's heap; `habit` is None while it is the C library's own, which can't be asked for again."""

    def __init__(self) -> None:
        self.habit: _Habit | None = None

    def set(self, habit: _Habit) -> bool:
        mallopt = _function("mallopt")
        if mallopt is None:
            return False
        self.habit = habit
        return bool(mallopt(_M_MMAP_THRESHOLD, habit.mapped) and mallopt(_M_TRIM_THRESHOLD, habit.trimmed))


_heap = _Heap()


def keep_freed_memory() -> bool:
    """Have glibc reuse freed memory instead of giving it back to the system and faulting it in anew each step.

    By default it maps and unmaps large tensors and trims the heap after every backward: on two ranks of the step
    benchmark 44,000 page faults and a tenth of the CPU time a step. Returns whether the C library understood.
    """
    return _heap.habit == _KEEPING or _heap.set(_KEEPING)


@contextlib.contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Have glibc give freed tensors back to the system inside of the block."""
    before = _heap.habit
    _heap.set(_RETURNING)
    try:
        yield
    finally:
        if before is not None:
            _heap.set(before)


def return_freed_memory() -> None:
    """Give all of the heap's free pages back to the system, wherever they lie.

    Its free memory lies in pieces, so that it grows by a large tensor at some steps: by 20 to 30 MB in 40 steps of the
    step benchmark. Between two steps, when most of it is free, this costs 30 ms there, and 40,000 page faults in the
    next step; between forward and backward, when most is in use, 10 ms and 12,000 page faults.
    """
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


class _HeapFigures(ctypes.Structure):
    """malloc.h: struct mallinfo2. Bytes: `arena` of all heaps, `uordblks` in use there, `hblkhd` in mappings apart."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names.split())


def heap_figures() -> Any:
    """Return what the C library says of its heaps; None where it has no mallinfo2 (glibc has from 2.33 on)."""
    figures = _function("mallinfo2")
    if figures is None:
        return None
    figures.restype = _HeapFigures
    return figures()


class GrowthTrimmer:
    """Returns freed memory when the heap has grown: what a new large tensor found no hole for stays no peak."""

    def __init__(self) -> None:
        self._size = 0  # of the heap when it was looked at last

    def look(self) -> None:
        """Trim the heap if it has grown by 1 MiB since the last look."""
        figures = heap_figures()
        if figures is None:
            return
        if figures.arena > self._size + (1 << 20):
            return_freed_memory()
        self._size = figures.arena


@functools.cache
def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
