"""Memory figures in one line."""

from __future__ import annotations

import psutil

from craken.comm import get_accelerator
from craken.log import log_dist

_GIB = 1 << 30


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
