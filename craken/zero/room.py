"""Memory for whole weights that comes and goes at one address: what autograd saved of it is right when it is back.

On CUDA the storage shrinks to nothing and grows again; the caching allocator makes that cheap. On the host that would
go through malloc, which either keeps the memory and mixes it with activations (peaks of 1.4 times the need), or returns
it and faults it in again 4 KiB at a time (a step takes 1.4 times as long). There each buffer is a mapping of its own:
freeing gives the pages back at once and forbids access, and huge pages make their return cheap.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

_PROT_NONE, _PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_HUGE_PAGE = 2 << 20
_SMALLEST_MAPPING = 64 << 10  # bytes; less goes through malloc: a process may have 65,530 mappings


_mapped: weakref.WeakKeyDictionary[mmap.mmap, int] = weakref.WeakKeyDictionary()  # -> bytes that are there now


def mapped_bytes() -> int:
    """Return what this process's rooms on the host take now, which the heap's own figures leave out."""
    return sum(_mapped.values())


class Room(Protocol):
    """One buffer whose memory comes and goes; it is there when the room is made."""

    flat: Tensor  # [numel]

    def take(self) -> None:
        """Have memory again, of undefined contents."""

    def give_back(self) -> None:
        """Let the memory go; reading `flat` or its aliases afterwards is an error or ends the process."""

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""


def room_for(numel: int, dtype: torch.dtype, device: torch.device) -> Room:
    """Return a room for `numel` elements."""
    is_large = numel * dtype.itemsize >= _SMALLEST_MAPPING
    if device.type == "cpu" and is_large and _mprotect() is not None:
        return _Mapping(numel, dtype)
    return _Storage(torch.empty(numel, dtype=dtype, device=device))


class _Storage:
    """A tensor's storage that is resized."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self._full = flat.untyped_storage().nbytes()

    def take(self) -> None:
        self.flat.untyped_storage().resize_(self._full)

    def give_back(self) -> None:
        self.flat.untyped_storage().resize_(0)

    @property
    def num_bytes(self) -> int:
        return self.flat.untyped_storage().nbytes()


class _Mapping:
    """Anonymous pages of the host's."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        self._size = -(-numel * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if self._size >= _HUGE_PAGE:
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        self.flat = torch.frombuffer(self._pages, dtype=dtype, count=numel)
        _mapped[self._pages] = self._size

    def take(self) -> None:
        self._protect(_PROT_READ_WRITE)
        _mapped[self._pages] = self._size

    def give_back(self) -> None:
        self._pages.madvise(mmap.MADV_DONTNEED)
        self._protect(_PROT_NONE)
        _mapped[self._pages] = 0

    def _protect(self, rights: int) -> None:
        mprotect = _mprotect()
        assert mprotect is not None
        if mprotect(ctypes.c_void_p(self.flat.data_ptr()), ctypes.c_size_t(self._size), rights):
            raise MemoryError(f"mprotect of {self._size} bytes of weights failed: the system is out of mappings")

    @property
    def num_bytes(self) -> int:
        return _mapped[self._pages]


@functools.cache
def _mprotect() -> Any:
    """Return the system's mprotect where mappings can be advised, or None."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "mprotect", None)
