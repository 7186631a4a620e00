"""A linear layer cut into tiles, for layers whose weight alone is too large to be whole.

x [.., in]     x0    x1          tiles are linear layers of their own, so at stage 3 each is gathered, used and freed
out 0          W00 + W01         before the next. Biases belong to the last column's tiles: added once.
out 1          W10 + W11
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from craken.zero.access import GatheredParameters


class TiledLinear(nn.Module):
    """`nn.Linear` in `in_splits` x `out_splits` tiles; `tiles[o][i]` maps the input's part i to the output's part o."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        in_splits: int = 1,
        out_splits: int = 1,
        input_is_already_split: bool = False,
        combine_out_splits: bool = True,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
        init_linear: nn.Linear | None = None,
        **kwargs: Any,
    ) -> None:
        """The arguments are DeepSpeed's. Parts differ by one feature at most; `kwargs` go to `linear_cls`.

        input_is_already_split: forward takes a sequence of the parts. combine_out_splits: without it, forward returns
        the list of the output's parts. init_linear: whose values to take; collective where those are shards.
        """
        super().__init__()
        _check_splits("in", in_features, in_splits)
        _check_splits("out", out_features, out_splits)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.takes_parts, self.combines = input_is_already_split, combine_out_splits
        self.in_sizes, self.out_sizes = _sizes(in_features, in_splits), _sizes(out_features, out_splits)
        self.tiles = nn.ModuleList(
            nn.ModuleList(
                linear_cls(width, height, bias=bias and at == in_splits - 1, **kwargs)
                for at, width in enumerate(self.in_sizes)
            )
            for height in self.out_sizes
        )
        if init_linear is not None:
            self.copy_params_from(init_linear)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Return [..., out_features], or the list of its parts; `x` is [..., in_features], or all its parts."""
        parts: Sequence[Tensor] = list(x) if self.takes_parts else torch.split(_as_tensor(x), self.in_sizes, dim=-1)
        if len(parts) != len(self.in_sizes):
            raise ValueError(f"TiledLinear: expected {len(self.in_sizes)} parts of the input, got {len(parts)}")
        outputs = [_sum_of(row, parts) for row in self._rows()]
        return torch.cat(outputs, dim=-1) if self.combines else outputs

    @torch.no_grad()
    def copy_params_from(self, other: nn.Linear) -> None:
        """Take the values of a linear layer of the same size. Collective where either is kept as shards."""
        with GatheredParameters([other.weight, other.bias]):
            self._check_like(other)
            rows = torch.split(other.weight, self.out_sizes)
            biases = torch.split(other.bias, self.out_sizes) if self.use_bias else [None] * len(rows)
            for tiles, row, bias in zip(self._rows(), rows, biases, strict=True):
                for tile, values in zip(tiles, torch.split(row, self.in_sizes, dim=1), strict=True):
                    _fill(tile.weight, values)
                if bias is not None:
                    _fill(tiles[-1].bias, bias)

    def _rows(self) -> list[Any]:
        return list(self.tiles)

    def _check_like(self, other: nn.Linear) -> None:
        expected = ((self.out_features, self.in_features), self.use_bias)
        if (tuple(other.weight.shape), other.bias is not None) != expected:
            raise ValueError(
                f"TiledLinear: expected a layer with weight {expected[0]} and bias={expected[1]} to copy from, got "
                f"{tuple(other.weight.shape)} and bias={other.bias is not None}"
            )


def _check_splits(side: str, features: int, splits: int) -> None:
    if not 1 <= splits <= features:
        raise ValueError(f"TiledLinear: expected {side}_splits from 1 to {side}_features={features}, got {splits}")


def _sizes(features: int, splits: int) -> list[int]:
    least, more = divmod(features, splits)
    return [least + (at < more) for at in range(splits)]


def _as_tensor(x: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"TiledLinear: expected a tensor, got a {type(x).__name__}; see input_is_already_split")
    return x


def _sum_of(tiles: Any, parts: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for tile, part in zip(tiles, parts, strict=True):
        output = tile(part)
        total = output if total is None else total + output
    assert total is not None
    return total


def _fill(param: Any, values: Tensor) -> None:
    with GatheredParameters(param, modifier_rank=0):
        param.copy_(values)
