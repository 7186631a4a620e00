"""The device this process computes on: its name, memory figures and communication backend.

Clients and launchers ask for it through `get_accelerator()`; nothing here initialises CUDA before it is asked to.
"""

from __future__ import annotations

import functools
import os

import psutil
import torch


class Accelerator:
    """One kind of device, `cuda` or `cpu`, with the few questions that the engine and its clients ask of it."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    @property
    def is_cpu(self) -> bool:
        return self.device_type == "cpu"

    def device_name(self, index: int | None = None) -> str:
        """Return `cpu`, `cuda`, or `cuda:index`."""
        return self.device_type if self.is_cpu or index is None else f"{self.device_type}:{index}"

    def current_device(self) -> int:
        return 0 if self.is_cpu else torch.cuda.current_device()

    def current_device_name(self) -> str:
        """Return the name of the device this process uses, for instance `cuda:0`."""
        return self.device_name(None if self.is_cpu else self.current_device())

    def device(self) -> torch.device:
        return torch.device(self.current_device_name())

    def device_count(self) -> int:
        """Return how many devices there are; on a machine without an accelerator, the ranks a launcher started here."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.is_cpu else torch.cuda.device_count()

    def is_available(self) -> bool:
        return True

    def set_device(self, index: int) -> None:
        if not self.is_cpu:
            torch.cuda.set_device(index)

    def communication_backend_name(self) -> str:
        return "gloo" if self.is_cpu else "nccl"

    def synchronize(self) -> None:
        """Wait until the device has done all work queued on it."""
        if not self.is_cpu:
            torch.cuda.synchronize()

    def is_bf16_supported(self) -> bool:
        return self.is_cpu or torch.cuda.is_bf16_supported()

    def is_fp16_supported(self) -> bool:
        return True

    def memory_allocated(self) -> int:
        """Return bytes in use now: the allocator's on CUDA, this process's resident memory on CPU."""
        return int(psutil.Process().memory_info().rss) if self.is_cpu else torch.cuda.memory_allocated()

    def max_memory_allocated(self) -> int:
        """Return the peak of `memory_allocated` in bytes, since the process or `reset_peak_memory_stats` began."""
        return _peak_resident_bytes() if self.is_cpu else torch.cuda.max_memory_allocated()

    def reset_peak_memory_stats(self) -> None:
        if self.is_cpu:
            _reset_peak_resident()
        else:
            torch.cuda.reset_peak_memory_stats()

    def total_memory(self) -> int:
        """Return the bytes of the device (on CPU: of the host)."""
        if self.is_cpu:
            return int(psutil.virtual_memory().total)
        return int(torch.cuda.get_device_properties(self.current_device()).total_memory)

    def available_memory(self) -> int:
        """Return the bytes of the device that nobody uses now."""
        return int(psutil.virtual_memory().available) if self.is_cpu else int(torch.cuda.mem_get_info()[0])

    def empty_cache(self) -> None:
        if not self.is_cpu:
            torch.cuda.empty_cache()


@functools.cache
def get_accelerator() -> Accelerator:
    """Return this process's accelerator: CUDA where there is one, else the CPU. `DS_ACCELERATOR=cpu` forces the CPU."""
    wanted = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise ValueError(f"DS_ACCELERATOR is {wanted!r}; expected 'cpu' or 'cuda'")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("DS_ACCELERATOR is 'cuda', but torch finds no CUDA device; unset it or set it to 'cpu'")
    return Accelerator(wanted)


def _peak_resident_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def _reset_peak_resident() -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
            clear.write("5")
    except OSError:
        return  # no such file outside Linux: the peak then counts from the start of the process
