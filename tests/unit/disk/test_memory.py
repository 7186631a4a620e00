"""Pages: aligned, zeroed, and gone when nobody needs them."""

from __future__ import annotations

import torch

from craken.disk import pages


def test_pages_are_aligned_zeroed_and_whole() -> None:
    memory = pages(5000)
    assert (memory.dtype, memory.numel(), memory.data_ptr() % 4096) == (torch.uint8, 8192, 0)
    assert memory.count_nonzero() == 0
    assert pages(0).numel() == 0


def test_freed_pages_leave_the_process() -> None:
    def resident_bytes() -> int:
        return int(open("/proc/self/statm").read().split()[1]) * 4096

    before = resident_bytes()
    memory = pages(64 << 20).fill_(1)
    assert resident_bytes() > before + (60 << 20)
    del memory
    assert resident_bytes() < before + (8 << 20)
