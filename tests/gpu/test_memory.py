"""On CUDA: pages that are pinned are so to torch too, carry copies both ways, and are let go of."""

from __future__ import annotations

import gc

import pytest
import torch

from craken.disk import Swap, pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
NUM_BYTES = 64 << 20


def test_pinned_pages_carry_copies_between_disk_and_device(tmp_path) -> None:
    swap = Swap(tmp_path)
    file, out, back = swap.file("state", NUM_BYTES), pages(NUM_BYTES, pinned=True), pages(NUM_BYTES, pinned=True)
    assert out.is_pinned()
    assert back.is_pinned()
    on_device = torch.randint(0, 256, (NUM_BYTES,), dtype=torch.uint8, device="cuda")
    out.copy_(on_device, non_blocking=True)
    torch.cuda.synchronize()
    file.write(out).wait()
    file.read(back).wait()
    assert torch.equal(back.to("cuda", non_blocking=True), on_device)
    swap.close()


def test_pinned_pages_can_be_made_and_dropped_again_and_again() -> None:
    """Whoever left them registered would be refused where the same addresses come back."""
    for _ in range(5):
        memory = pages(NUM_BYTES, pinned=True)
        assert memory.is_pinned()
        del memory
        gc.collect()


def test_pages_are_not_pinned_unless_asked() -> None:
    assert not pages(4096).is_pinned()
