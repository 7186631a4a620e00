"""Block quantisation: how far values come back from where they were, and how much travels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from craken.comm.codec import BLOCK, Codec

CODECS = [Codec(8), Codec(4)]
EPSILON = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}

codecs = pytest.mark.parametrize("codec", CODECS, ids=["8 bits", "4 bits"])


def there_and_back(codec: Codec, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    messages = torch.empty(values.shape[0], codec.num_bytes(values.shape[1]), dtype=torch.uint8)
    codec.quantise(values, messages)
    out = torch.empty(values.shape, dtype=dtype or values.dtype)
    codec.dequantise(messages, out)
    return out


def half_steps(codec: Codec, values: Tensor) -> Tensor:
    """Return for each element half the distance between two codes of its block."""
    blocks = torch.nn.functional.pad(values.float(), (0, -values.shape[1] % BLOCK)).view(values.shape[0], -1, BLOCK)
    steps = blocks.abs().amax(-1, keepdim=True) / codec.largest_code
    return (steps / 2).expand(blocks.shape).reshape(values.shape[0], -1)[:, : values.shape[1]]


@codecs
@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, BLOCK), (2, BLOCK + 1), (1, 5 * BLOCK - 7), (3, 70_001)])
def test_a_value_comes_back_within_half_a_step(codec, dtype, shape) -> None:
    generator = torch.Generator().manual_seed(1)
    values = (torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()).to(dtype)
    back = there_and_back(codec, values)
    bound = half_steps(codec, values) * (1 + 2**-20) + values.float().abs() * EPSILON[dtype]
    bound += half_steps(codec, values) * 2 * EPSILON[dtype]  # the value is rounded where it lands, up to a step away
    assert ((back.float() - values.float()).abs() <= bound).all()


@codecs
def test_zeros_stay_zeros_and_the_largest_stays(codec) -> None:
    values = torch.zeros(1, 3 * BLOCK)
    values[0, BLOCK] = -3.5
    assert torch.equal(there_and_back(codec, values), values)


@codecs
def test_blocks_do_not_disturb_each_other(codec) -> None:
    values = torch.full((1, 2 * BLOCK), 1e-6)
    values[0, :BLOCK] = 1e6
    assert torch.allclose(there_and_back(codec, values), values, rtol=1e-6)


@codecs
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_an_overflow_is_seen_on_the_other_side(codec, bad) -> None:
    values = torch.ones(2, 2 * BLOCK)
    values[1, BLOCK + 9] = bad
    back = there_and_back(codec, values)
    assert back[1, BLOCK:].isnan().all()
    assert torch.equal(back[0], values[0])
    assert torch.equal(back[1, :BLOCK], values[1, :BLOCK])


@codecs
def test_values_below_what_a_scale_can_hold_stay_small(codec) -> None:
    values = torch.full((1, BLOCK), 190 * 2.0**-149)  # denormal; the scale is a few units of it
    assert there_and_back(codec, values).abs().max() <= 2 * values.max()


@codecs
def test_what_comes_back_can_be_added(codec) -> None:
    values = torch.randn(2, 300, generator=torch.Generator().manual_seed(2))
    messages = torch.empty(2, codec.num_bytes(300), dtype=torch.uint8)
    codec.quantise(values, messages)
    out = torch.ones(2, 300)
    codec.dequantise(messages, out, add=True)
    assert torch.equal(out, there_and_back(codec, values) + 1)


@codecs
def test_a_strided_view_is_read_where_it_lies(codec) -> None:
    values = torch.randn(3, 2, 500, generator=torch.Generator().manual_seed(3))
    assert torch.equal(there_and_back(codec, values[:, 1]), there_and_back(codec, values[:, 1].clone()))


def test_messages_take_half_and_a_quarter_of_bf16_and_the_scales() -> None:
    numel = 1 << 20
    assert Codec(8).num_bytes(numel) == numel + 4 * numel // BLOCK
    assert Codec(4).num_bytes(numel) == numel // 2 + 4 * numel // BLOCK


def test_wrong_uses_are_named() -> None:
    with pytest.raises(ValueError, match="4 or 8 bits"):
        Codec(3)
    with pytest.raises(ValueError, match=r"expected uint8 \[rows, 20\], got torch.uint8 \[1, 7\]"):
        Codec(8).quantise(torch.ones(1, 5), torch.empty(1, 7, dtype=torch.uint8))
