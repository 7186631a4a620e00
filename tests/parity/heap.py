"""Bytes that this process holds from the C library's allocator: every tensor counts, whoever refers to it."""

from __future__ import annotations

import ctypes
import gc

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]


def can_count() -> bool:
    """Say whether this C library has mallinfo2 (glibc from 2.33)."""
    try:
        return hasattr(ctypes.CDLL("libc.so.6"), "mallinfo2")
    except OSError:
        return False


def bytes_in_use() -> int:
    """Return the bytes in use after garbage collection: in the heap, in blocks mapped apart, in rooms."""
    from craken.zero import mapped_bytes

    while gc.collect():  # what a graph of autograd's hides from the collector comes to light layer by layer
        pass
    function = ctypes.CDLL("libc.so.6").mallinfo2
    function.restype = _Mallinfo2
    info = function()
    return int(info.uordblks + info.hblkhd) + mapped_bytes()
