"""Building modules in one dtype on one device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from craken.zero import OnDevice


def test_modules_are_built_in_the_dtype_on_the_device() -> None:
    with OnDevice(dtype=torch.bfloat16):
        layer = nn.Linear(2, 2)
        index = torch.arange(3)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "meta")
    assert index.dtype is torch.int64
    with OnDevice(torch.float64, device="cpu"):
        assert (nn.Linear(2, 2).bias.dtype, torch.ones(1).device.type) == (torch.float64, "cpu")
    with OnDevice(torch.bfloat16, enabled=False):
        assert torch.ones(1).dtype is torch.float32


def raise_inside() -> None:
    with OnDevice(torch.float16):
        raise KeyError


def test_everything_is_as_before_afterwards() -> None:
    with pytest.raises(KeyError):
        raise_inside()
    assert (torch.ones(1).dtype, torch.ones(1).device.type) == (torch.float32, "cpu")
    with pytest.raises(ValueError, match="floating dtype"):
        OnDevice(torch.int8)
