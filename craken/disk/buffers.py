"""Host memory that disk and accelerator take as it is: page-aligned, optionally pinned, and never more than planned."""

from __future__ import annotations

import mmap
import queue
import weakref

import torch
from torch import Tensor

from craken.disk.settings import round_up

_PATIENCE_S = 600.0


class Buffers:
    """At most `num` buffers of `num_bytes`, made when first needed: `take` one, `give_back` when done."""

    def __init__(self, num: int, num_bytes: int, *, pinned: bool = False) -> None:
        if num < 1 or num_bytes < 1:
            raise ValueError(f"expected at least one buffer of at least one byte, got {num} of {num_bytes}")
        self.num = num
        self.num_bytes = round_up(num_bytes)
        self._pinned = pinned
        self._made: dict[int, Tensor] = {}  # by address
        self._out: set[int] = set()
        self._free: queue.LifoQueue[Tensor | None] = queue.LifoQueue()
        for _ in range(num):
            self._free.put(None)  # leave to make one

    def take(self, *, timeout_s: float = _PATIENCE_S) -> Tensor:  # uint8 [num_bytes]
        """Return a buffer, waiting until one is free; RuntimeError after `timeout_s`, when nobody gave one back."""
        try:
            buffer = self._free.get(timeout=timeout_s)
        except queue.Empty:
            raise RuntimeError(
                f"all {self.num} buffers of {self.num_bytes:,} bytes have been out for {timeout_s:.0f} s: whoever took "
                f"them waits for another one, or forgot to give back"
            ) from None
        if buffer is None:
            buffer = pages(self.num_bytes, pinned=self._pinned)
            self._made[buffer.data_ptr()] = buffer
        self._out.add(buffer.data_ptr())
        return buffer

    def give_back(self, buffer: Tensor) -> None:
        """Let others have `buffer`; nothing may be on its way into or out of it."""
        address = buffer.data_ptr()
        if address not in self._out:
            raise ValueError("expected a buffer that is out: give back what take() returned, once")
        self._out.remove(address)
        self._free.put(self._made[address])


def pages(num_bytes: int, *, pinned: bool = False) -> Tensor:  # uint8 [num_bytes rounded up]
    """Return zeroed memory of whole pages, to be freed with the tensor; `pinned` counts where there is CUDA.

    Copies between pinned pages and the accelerator are asynchronous; who reuses the pages waits for them, torch does
    not know of them as it knows of its own.
    """
    size = round_up(num_bytes)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # large pages halve the CPU time of a transfer; and a fork must not move pages away from under one
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            memory.madvise(getattr(mmap, advice))
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned and torch.cuda.is_available():
        _pin(buffer)
    return buffer


def _pin(buffer: Tensor) -> None:
    cudart, address = torch.cuda.cudart(), buffer.data_ptr()  # type: ignore[no-untyped-call]
    code = cudart.cudaHostRegister(address, buffer.numel(), 0)
    if int(code):
        raise RuntimeError(f"cannot pin {buffer.numel():,} bytes of host memory ({code}); set pin_memory to false")
    # with the storage: a mapping is gone by the time its own finalizers run; not at exit: the driver has done it then
    weakref.finalize(buffer.untyped_storage(), cudart.cudaHostUnregister, address).atexit = False
