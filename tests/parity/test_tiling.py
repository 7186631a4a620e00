"""At stage 3 the tiles of a linear layer come and go one at a time."""

from __future__ import annotations

import torch
from torch import nn

from tests.parity.side_by_side import Pair


def build(folded: bool) -> nn.Module:
    from craken.zero import Init, TiledLinear

    torch.manual_seed(6)
    with Init(enabled=folded):
        return nn.Sequential(TiledLinear(6, 8, in_splits=2, out_splits=2, init_linear=nn.Linear(6, 8)))


def tiles_one_at_a_time(folded: bool) -> int:
    """Return the most elements of the layer that were whole at a time."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    zero |= {"reduce_bucket_size": 4 * 3 + 4, "stage3_max_live_parameters": 4 * 3 + 4}
    pair = Pair(3, build(folded), config={"zero_optimization": zero})
    seen = []
    params = list(pair.model.parameters())
    for row in pair.model[0].tiles:
        for tile in row:
            tile.register_forward_pre_hook(lambda *_: seen.append(sum(p.numel() for p in params)))
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights(atol=1e-5)
    pair.close()
    return max(seen)


def test_a_tile_is_whole_while_it_computes(run_ranks) -> None:
    for folded in (False, True):
        assert run_ranks(tiles_one_at_a_time, 2, folded) == [4 * 3 + 4] * 2
