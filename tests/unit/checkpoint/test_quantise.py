"""Quantised weights: the numbers that bitsandbytes makes, and no error larger than the form allows."""

from __future__ import annotations

import json

import pytest
import torch

from craken.checkpoint import lazy
from craken.checkpoint.export.quantise import BLOCK_NUMEL, quantise
from craken.checkpoint.lazy import of_tensor
from tests.unit.checkpoint.models import Tensors, two_layers
from tests.unit.checkpoint.ranks import numbers


def quantised(weight: torch.Tensor, form: str) -> Tensors:
    found = quantise({"a.weight": of_tensor(weight)}, ["a"], form, torch.bfloat16)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def test_int8_rows_come_back_within_half_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 4 * 100)  # one row at a time
    weight = numbers(9, 70)
    weight[4] = 0
    found = quantised(weight, "int8")
    assert found["a.weight"].dtype == torch.int8
    assert torch.equal(found["a.SCB"], weight.abs().amax(1))
    back = found["a.weight"].float() * found["a.SCB"][:, None] / 127
    assert ((back - weight).abs() <= found["a.SCB"][:, None] / 254 + 1e-7).all()
    assert found["a.weight_format"].shape == ()


@pytest.mark.parametrize("shape", [(9, 70), (4, 64), (3, 5)])
def test_int4_blocks_take_the_nearest_level(monkeypatch: pytest.MonkeyPatch, shape) -> None:
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 4 * 2 * BLOCK_NUMEL)
    weight = numbers(*shape)
    found = quantised(weight, "int4")
    packed, levels = found["a.weight"], found["a.weight.quant_map"]
    numbers_of = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], 1).view(-1)[: weight.numel()].long()
    flat = torch.nn.functional.pad(weight.view(-1), (0, -weight.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)
    scales = flat.abs().amax(1)
    assert torch.equal(found["a.weight.absmax"], scales)
    scaled = (flat / scales[:, None]).view(-1)[: weight.numel()]
    nearest = (scaled[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((levels[numbers_of] - scaled).abs(), nearest)
    facts = json.loads(bytes(found["a.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert facts == {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}


def test_the_numbers_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = numbers(32, 128)
    found = quantised(weight, "int4")
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(found["a.weight"], packed)
    assert torch.equal(found["a.weight.absmax"], state.absmax)
    assert torch.equal(found["a.weight.quant_map"], state.code)
    rows, scales, _ = functional.int8_vectorwise_quant(weight)
    found = quantised(weight, "int8")
    assert torch.equal(found["a.weight"], rows)
    assert torch.equal(found["a.SCB"], scales)


def test_other_tensors_are_left_and_unfit_ones_named() -> None:
    lazies = {name: of_tensor(tensor) for name, tensor in two_layers().items()}
    found = quantise(lazies, ["layers.0.proj"], "int8", torch.float32)
    assert all(found[name] is lazies[name] for name in lazies if name != "layers.0.proj.weight")
    with pytest.raises(
        ValueError, match=r"layers\.7\.weight: expected a floating-point matrix to quantise, got nothing"
    ):
        quantise(lazies, ["layers.7"], "int8", torch.float32)
    broken = of_tensor(torch.tensor([[1.0, float("nan")]]))
    for form in ("int8", "int4"):
        with pytest.raises(ValueError, match=r"a\.weight holds infinite values or NaN"):
            quantise({"a.weight": broken}, ["a"], form, torch.float32)["a.weight"].contiguous()
