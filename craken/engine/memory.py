"""Memory figures in one line, and how the host's allocator treats freed memory."""

from __future__ import annotations

import ctypes
import functools
import sys

import psutil

from craken.comm import get_accelerator
from craken.log import log_dist

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more on 64-bit machines
_GIB = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc reuse freed memory instead of giving it back to the system and faulting it in anew each step.

    By default it maps and unmaps large tensors and trims the heap after every backward: on two ranks of the step
    benchmark 44,000 page faults and a tenth of the CPU time a step. Returns whether the C library understood.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _GIB))


def return_freed_memory() -> None:
    """Give all of the heap's free pages back to the system, wherever they lie.

    Where weights come and go, the heap's free memory spreads over the steps: 60 MB in ten steps of the step benchmark.
    Costs 30 ms there, and the pages' return.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_line() -> str:
    """Return device memory now and at its peak, and host memory, in GiB."""
    accelerator, host = get_accelerator(), psutil.virtual_memory()
    return (
        f"{accelerator.current_device_name()}: {accelerator.memory_allocated() / _GIB:.2f} GiB in use, "
        f"{accelerator.max_memory_allocated() / _GIB:.2f} GiB at peak of {accelerator.total_memory() / _GIB:.2f}; "
        f"host: {host.used / _GIB:.2f} of {host.total / _GIB:.2f} GiB used ({host.percent:.0f} %)"
    )


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log `message` with the memory figures on rank 0, if `force`; then start the peak anew."""
    if force:
        log_dist(f"{message} | {memory_line()}")
        get_accelerator().reset_peak_memory_stats()
