"""Tensors made range by range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from craken.checkpoint import lazy
from craken.checkpoint.lazy import LazyTensor, cast, of_tensor
from tests.unit.checkpoint.ranks import numbers


def test_ranges_are_bounded_and_made_of_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 4 * 25)
    full, asked = numbers(10, 7), []

    def read(low: int, high: int) -> Tensor:
        asked.append((low, high))
        return full.view(-1)[low:high]

    assert torch.equal(LazyTensor((10, 7), torch.float32, read, unit=7).contiguous(), full)
    assert asked == [(0, 21), (21, 42), (42, 63), (63, 70)]
    asked.clear()
    assert torch.equal(LazyTensor((10, 7), torch.float32, read).contiguous(), full)
    assert asked == [(0, 25), (25, 50), (50, 70)]
    asked.clear()
    assert torch.equal(LazyTensor((2, 35), torch.float32, read, unit=35).contiguous(), full.view(2, 35))
    assert asked == [(0, 35), (35, 70)]


def test_scalars_and_empty_tensors_are_tensors_too() -> None:
    for value in (torch.tensor(3.0), torch.empty(0, 4)):
        assert torch.equal(of_tensor(value).contiguous(), value)


def test_a_cast_rounds_as_torch_does_and_keeps_what_was_infinite() -> None:
    full = torch.cat([numbers(9), torch.tensor([float("inf"), float("nan")])])
    assert torch.equal(cast("w", of_tensor(full), torch.bfloat16).contiguous()[:10], full.bfloat16()[:10])
    assert cast("w", of_tensor(full), torch.float16).contiguous()[9:].isfinite().sum() == 0


def test_a_value_too_large_for_fp16_is_named() -> None:
    with pytest.raises(ValueError, match=r"head.weight holds 7e\+04, torch.float16 ends at 6.55e\+04"):
        cast("head.weight", of_tensor(torch.tensor([1.0, 7e4])), torch.float16).contiguous()
