"""Norms: right where one flat fp32 norm is off, and loud about inf and nan."""

import math

import pytest
import torch

from craken.zero.norms import piece_norms, sum_of_squares


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-5)])
def test_norm_of_millions_of_elements_is_right(dtype, tolerance):
    flat = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = flat.double().square().sum().item()
    assert math.isclose(sum_of_squares([piece_norms(flat)]), exact, rel_tol=tolerance)


def test_groups_add_up_in_float64():
    parts = [torch.full((1000,), 1e-3), torch.full((1000,), 1e3)]
    assert math.isclose(sum_of_squares(map(piece_norms, parts)), 1e9 + 1e-3, rel_tol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_shows(bad):
    flat = torch.zeros(250_000)
    flat[200_001] = bad
    assert not math.isfinite(sum_of_squares([piece_norms(flat)]))


def test_nothing_has_norm_zero():
    assert sum_of_squares([]) == 0.0
