"""Bytes that this process holds from the C library's allocator: every tensor counts, whoever refers to it."""

from __future__ import annotations

import gc


def can_count() -> bool:
    """Say whether this C library tells (glibc from 2.33)."""
    from craken.zero.memory.heap import heap_figures

    return heap_figures() is not None


def bytes_in_use() -> int:
    """Return the bytes in use after garbage collection."""
    while gc.collect():  # what a graph of autograd's hides from the collector comes to light layer by layer
        pass
    return bytes_now()


def bytes_now() -> int:
    """Return the bytes in use: in the heap, in blocks mapped apart, in rooms."""
    from craken.zero import mapped_bytes
    from craken.zero.memory.heap import heap_figures

    figures = heap_figures()
    return int(figures.uordblks + figures.hblkhd) + mapped_bytes()
