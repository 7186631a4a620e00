"""Adding up what ranks sent: one rounding, a fixed order, nothing added twice."""

import pytest
import torch

from craken.comm.transport import add_up


@pytest.mark.parametrize("num_terms", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_is_that_of_fp32_rounded_once(num_terms, dtype):
    generator = torch.Generator().manual_seed(1)
    own, *received = (torch.randn(257, generator=generator).to(dtype) for _ in range(num_terms + 1))
    exact = sum((term.float() for term in received), own.float())
    out = torch.empty_like(own)
    add_up(own, received, out, add=False)
    assert torch.equal(out, exact.to(dtype))


def test_sum_in_place_of_the_own_part():
    own, other = torch.arange(4.0), torch.full((4,), 2.0)
    add_up(own, [other, other], own, add=False)
    assert own.tolist() == [4.0, 5.0, 6.0, 7.0]


def test_add_keeps_what_was_there():
    out = torch.full((3,), 10.0)
    add_up(torch.ones(3, dtype=torch.bfloat16), [torch.ones(3, dtype=torch.bfloat16)], out, add=True)
    assert out.tolist() == [12.0] * 3


def test_256_ones_in_bf16_are_counted():
    ones = [torch.ones(1, dtype=torch.bfloat16)] * 300
    out = torch.empty(1)
    add_up(ones[0], ones[1:], out, add=False)
    assert out.item() == 300.0  # a bf16 accumulator stops at 256
