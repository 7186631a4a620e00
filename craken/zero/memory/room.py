"""Memory for whole weights that comes and goes at one address: what autograd saved of it is right when it is back.

On CUDA the storage shrinks to nothing and grows again; the caching allocator makes that cheap. On the host that would
go through malloc, which either keeps the memory and mixes it with activations (peaks of 1.4 times the need), or returns
it and faults it in again 4 KiB at a time (a step takes 1.4 times as long). There each buffer is a mapping of its own:
freeing forbids access, and the pages go back at once or wait for the next buffer of that size (IdlePages).

Who keeps an alias of a weight too long is hard to find so: with CRAKEN_DEBUG_FREED=1 nothing is given back, and what
would be reads as NaN, which anomaly detection and a look at the values find.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
import weakref
from collections import OrderedDict
from typing import Any, Protocol

import torch
from torch import Tensor

from craken.log import warn_once

_PROT_NONE, _PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAYMOVE_FIXED_DONTUNMAP = 1 | 2 | 4  # of mremap; the last is known since Linux 5.7
_UNKNOWN_CALL = (errno.EINVAL, errno.ENOSYS, errno.EPERM)
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


class IdlePages:
    """Pages that rooms gave back, for others of the same size to move in: at most `limit` bytes, while it is `open`.

    The system clears each page that it hands out, which took 4 % of a step of the step benchmark; pages that move from
    room to room cost a change of page tables. Pages that nobody fits into go as others are taken, so rooms and idle
    pages together never take more than rooms did.
    """

    def __init__(self) -> None:
        self.limit = 0
        self._is_open = False
        self._rooms: OrderedDict[int, _Mapping] = OrderedDict()  # by address, the longest idle first

    def open(self, is_open: bool) -> None:
        """Say whether rooms are about to be taken again; if not, nothing is kept."""
        self._is_open = is_open
        if not is_open:
            self._drop(self.num_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(room.size for room in self._rooms.values())

    def put(self, room: _Mapping) -> None:
        """Take the pages of a room that was given back."""
        limit = self.limit * self._is_open
        if room.size > limit:
            room.drop_pages()
            return
        self._rooms[room.address] = room
        self._drop(self.num_bytes - limit)

    def bring(self, room: _Mapping) -> None:
        """Move idle pages to `room`: its own, or those of another of its size."""
        fitting = (idle for idle in self._rooms.values() if idle.size == room.size)
        donor = self._rooms.get(room.address) or next(fitting, None)
        if donor is not None and donor.move_pages(room):
            del self._rooms[donor.address]
        else:
            self._drop(room.size)

    def _drop(self, num_bytes: int) -> None:
        while num_bytes > 0 and self._rooms:
            _, longest = self._rooms.popitem(last=False)
            num_bytes -= longest.size
            longest.drop_pages()


def room_for(numel: int, dtype: torch.dtype, device: torch.device, idle: IdlePages | None = None) -> Room:
    """Return a room for `numel` elements; on the host its pages go to and come from `idle`, where that is given."""
    if os.environ.get("CRAKEN_DEBUG_FREED") == "1":
        warn_once("CRAKEN_DEBUG_FREED=1: freed weights stay in memory, filled with NaN")
        return _Poisoned(torch.empty(numel, dtype=dtype, device=device))
    is_large = numel * dtype.itemsize >= _SMALLEST_MAPPING
    if device.type == "cpu" and is_large and _system("mprotect") is not None:
        return _Mapping(numel, dtype, idle)
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


class _Poisoned:
    """A tensor that is kept and reads as NaN (integers: -1 or the largest) where its memory would be given back."""

    def __init__(self, flat: Tensor) -> None:
        self.flat, self._is_taken = flat, True

    def take(self) -> None:
        self._is_taken = True

    def give_back(self) -> None:
        self.flat.view(torch.uint8).fill_(0xFF)
        self._is_taken = False

    @property
    def num_bytes(self) -> int:
        return self.flat.nbytes if self._is_taken else 0


class _Mapping:
    """Anonymous pages of the host's, huge ones where they fit; aligned, for a huge page only moves as a whole then."""

    def __init__(self, numel: int, dtype: torch.dtype, idle: IdlePages | None) -> None:
        self.size = -(-numel * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        slack = _HUGE_PAGE if self.size >= _HUGE_PAGE else 0
        self._pages = mmap.mmap(-1, self.size + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        begin = torch.frombuffer(self._pages, dtype=torch.uint8).data_ptr()
        self._start = -begin % _HUGE_PAGE if slack else 0
        self.flat = torch.frombuffer(self._pages, dtype=dtype, count=numel, offset=self._start)
        self.address = self.flat.data_ptr()
        if slack:  # out of reach, so that it counts nowhere and no huge page reaches into it
            _protect(begin, self._start, _PROT_NONE)
            _protect(self.address + self.size, slack - self._start, _PROT_NONE)
            self._pages.madvise(mmap.MADV_HUGEPAGE, self._start, self.size)
        self._idle, self._is_taken = idle or IdlePages(), True  # one of its own keeps nothing
        _mapped[self._pages] = self.size

    def take(self) -> None:
        if not self._is_taken:
            self._idle.bring(self)
        _protect(self.address, self.size, _PROT_READ_WRITE)
        self._is_taken = True
        _mapped[self._pages] = self.size

    def give_back(self) -> None:
        _protect(self.address, self.size, _PROT_NONE)
        if self._is_taken:
            self._idle.put(self)
        self._is_taken = False

    def drop_pages(self) -> None:
        """Give the pages back to the system."""
        self._pages.madvise(mmap.MADV_DONTNEED, self._start, self.size)
        _mapped[self._pages] = 0

    def move_pages(self, room: _Mapping) -> bool:
        """Move this room's pages to `room`, which has none; False where the system can't."""
        if room is self:
            return True
        if not _remap(self.address, room.address, self.size):
            return False
        _mapped[self._pages], _mapped[room._pages] = 0, self.size
        return True

    @property
    def num_bytes(self) -> int:
        return _mapped[self._pages] if self._is_taken else 0


def _protect(address: int, size: int, rights: int) -> None:
    if size and _system("mprotect")(ctypes.c_void_p(address), ctypes.c_size_t(size), rights):
        raise MemoryError(f"mprotect of {size} bytes of weights failed: the system is out of mappings")


def _remap(source: int, target: int, size: int) -> bool:
    """Move pages from one mapping to another; both stay mapped. False where the system does not know how.

    MemoryError when it fails although it knows: nothing may be mapped at `target` then.
    """
    mremap = _system("mremap")
    if mremap is None:
        return False
    mremap.restype = ctypes.c_void_p
    sizes = ctypes.c_size_t(size), ctypes.c_size_t(size)
    moved = mremap(ctypes.c_void_p(source), *sizes, _MAYMOVE_FIXED_DONTUNMAP, ctypes.c_void_p(target))
    if moved != target and (code := ctypes.get_errno()) not in _UNKNOWN_CALL:
        raise MemoryError(f"moving {size} bytes of weights failed: {os.strerror(code)}")
    return bool(moved == target)


@functools.cache
def _system(name: str) -> Any:
    """Return a function of the C library's where mappings can be advised, or None."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)
