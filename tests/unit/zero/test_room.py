"""Memory for weights that comes and goes at one address."""

from __future__ import annotations

import gc

import pytest
import torch

from craken.zero.room import mapped_bytes, room_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_memory_comes_back_at_the_same_address(dtype) -> None:
    room = room_for(3_000_001, dtype, torch.device("cpu"))
    address = room.flat.data_ptr()
    alias = room.flat.view(-1)[5:10]
    room.flat.fill_(3)
    assert room.num_bytes >= 3_000_001 * dtype.itemsize
    room.give_back()
    assert room.num_bytes == 0
    room.take()
    assert room.flat.data_ptr() == address
    room.flat.fill_(7)
    assert alias.tolist() == [7] * 5


def test_what_is_mapped_is_counted_until_it_goes() -> None:
    gc.collect()
    before = mapped_bytes()
    kept = room_for(1 << 20, torch.float32, torch.device("cpu")).flat.copy_(torch.arange(1 << 20))
    assert kept[-1] == (1 << 20) - 1
    assert mapped_bytes() - before == 4 << 20
    del kept
    gc.collect()
    assert mapped_bytes() == before
