"""`model.to(dtype)` on a model that an engine trains: gathered, as shards, and where its weights are always whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.parity.side_by_side import Pair, error, inputs, value

WIDTH = 6


def layers() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))


def convert_and_go_on(how: str, gathered: bool) -> None:
    from craken.zero import GatheredParameters

    pair = Pair(3, layers())
    pair.step_both(0)
    before = [value(param) for param in pair.model.parameters()]
    params = list(pair.model.parameters())
    with GatheredParameters(params if gathered else None):
        getattr(pair.model, how)()
        if gathered:
            twin = getattr(copy.deepcopy(pair.twin), how)()
            x = inputs(1, 0).to(params[0].dtype)
            torch.testing.assert_close(pair.model(x), twin(x), rtol=0.02, atol=0.02)
    assert all(now is then for now, then in zip(pair.model.parameters(), params, strict=True))
    for param, old in zip(params, before, strict=True):
        assert torch.equal(value(param), old), "a conversion rounded what the shards hold"
    for step in range(1, 3):
        pair.step_both(step)
    assert {param.dtype for param in params} == {torch.float32}
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("gathered", [True, False], ids=["gathered", "as shards"])
@pytest.mark.parametrize("how", ["bfloat16", "half"])
def test_converting_sharded_weights_rounds_nothing_and_is_over_at_their_next_use(run_ranks, how, gathered) -> None:
    run_ranks(convert_and_go_on, 2, how, gathered)


def convert_whole_weights(stage: int) -> None:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 10**6}
    pair = Pair(stage, layers(), config={"zero_optimization": zero})
    pair.step_both(0)
    pair.model.to(torch.bfloat16)
    pair.engine.backward(error(pair.engine(inputs(1, pair.rank).bfloat16())))
    with pytest.raises(
        RuntimeError, match=r"0\.weight \(torch.bfloat16\) has left the engine's memory \(torch.float32\)"
    ):
        pair.engine.step()
    pair.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_on_whole_weights_that_were_converted_is_refused(run_ranks, stage) -> None:
    run_ranks(convert_whole_weights, 2, stage)
