"""A linear layer in tiles against the layer it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from craken.zero import TiledLinear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_splits", "out_splits"), [(1, 1), (3, 1), (1, 4), (3, 2)])
def test_tiles_compute_and_learn_what_the_layer_does(in_splits, out_splits, bias) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(10, 7, bias=bias)
    tiled = TiledLinear(10, 7, bias, in_splits, out_splits, init_linear=layer)
    x, twin = (torch.randn(2, 5, 10).requires_grad_() for _ in range(2))
    twin.data.copy_(x.data)
    expected, got = layer(twin), tiled(x)
    torch.testing.assert_close(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    grads = torch.cat([torch.cat([tile.weight.grad for tile in row], dim=1) for row in tiled.tiles])
    torch.testing.assert_close(grads, layer.weight.grad)
    if bias:
        torch.testing.assert_close(torch.cat([row[-1].bias.grad for row in tiled.tiles]), layer.bias.grad)
    assert sum(p.numel() for p in tiled.parameters()) == sum(p.numel() for p in layer.parameters())


def test_parts_may_come_and_go_apart() -> None:
    layer = nn.Linear(8, 6)
    tiled = TiledLinear(8, 6, True, 2, 3, input_is_already_split=True, combine_out_splits=False, init_linear=layer)
    x = torch.randn(4, 8)
    parts = tiled(x.split(4, dim=-1))
    assert [part.shape for part in parts] == [(4, 2)] * 3
    torch.testing.assert_close(torch.cat(parts, dim=-1), layer(x))
    with pytest.raises(ValueError, match="expected 2 parts of the input, got 1"):
        tiled([x])


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="expected in_splits from 1 to in_features=4, got 5"):
        TiledLinear(4, 4, in_splits=5)
    with pytest.raises(ValueError, match=r"expected a layer with weight \(6, 8\) and bias=True"):
        TiledLinear(8, 6, init_linear=nn.Linear(8, 5))
