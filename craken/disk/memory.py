"""Host memory that disk and accelerator take as it is: whole pages, optionally pinned."""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch
from torch import Tensor

from craken.disk.settings import round_up


def pages(num_bytes: int, *, pinned: bool = False) -> Tensor:  # uint8 [num_bytes rounded up]
    """Return zeroed memory of whole pages, to be freed with the tensor; `pinned` counts where there is CUDA.

    Copies between pinned pages and the accelerator are asynchronous; who reuses the pages waits for them, torch does
    not know of them as it knows of its own.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, round_up(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # large pages halve the CPU time of a transfer; and a fork must not move pages away from under one
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with contextlib.suppress(AttributeError, OSError):  # kernels may be built without
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
