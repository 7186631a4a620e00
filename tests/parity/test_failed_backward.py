"""A backward that raised in the middle and is run again over the same graph, beside plain PyTorch.

What the failed one had brought to `.grad` counts there, and so it does in the engine.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs

WIDTH = 6


class Troubled(torch.autograd.Function):
    """Passes on what it gets; its backward raises while its module says so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Middle) -> Tensor:
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.module.fails:
            raise ArithmeticError("in the middle of a backward")
        return grad, None


class Middle(nn.Module):
    """A block whose backward fails when the gradients of what comes after it are there already."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + Troubled.apply(self.down(self.up(x).tanh()), self)


def chain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(*(Middle() for _ in range(3)))


def run(pair: Pair, loss: Tensor, how: str) -> None:
    if how == "bare":
        loss.backward(retain_graph=True)
    else:
        pair.engine.backward(loss, retain_graph=True)


def fail(pair: Pair, loss: Tensor, how: str) -> None:
    pair.model[1].fails = True
    with pytest.raises(ArithmeticError):
        run(pair, loss, how)
    pair.model[1].fails = False


def twin_fails_and_retries(pair: Pair, step: int, num_failures: int) -> list[float]:
    losses = [error(pair.twin(inputs(step, rank))) for rank in range(pair.world_size)]
    for loss in losses:
        for _ in range(num_failures):
            pair.twin[1].fails = True
            with pytest.raises(ArithmeticError):
                (loss / pair.world_size).backward(retain_graph=True)
            pair.twin[1].fails = False
        (loss / pair.world_size).backward()
    pair.twin_step()
    return [loss.item() for loss in losses]


def fail_and_retry(stage: int, calls_engine: bool, ways: list[tuple[str, str, str]]) -> None:
    pair = Pair(stage, chain())
    for step, (first, second, retry) in enumerate(ways):
        loss = error((pair.engine if calls_engine else pair.model)(inputs(step, pair.rank)))
        for how in (first, second):
            fail(pair, loss, how)
        run(pair, loss, retry)
        if stage == 3:
            assert all(param.shape == (0,) for param in pair.model.parameters()), "the retry was not seen to end"
        pair.engine.step()
        pair.engine.check_integrity()
        expected = twin_fails_and_retries(pair, step, num_failures=2)
        assert loss.item() == pytest.approx(expected[pair.rank], rel=1e-6)
    for step in range(3, 5):
        pair.step_both(step)
    pair.assert_same_weights(atol=1e-5)
    pair.close()


WAYS = [("bare", "bare", "bare"), ("bare", "engine", "bare"), ("engine", "bare", "engine")]


@pytest.mark.parametrize("calls_engine", [True, False], ids=["engine forward", "bare forward"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_backward_that_raised_may_be_run_again_without_a_forward(run_ranks, stage, calls_engine) -> None:
    run_ranks(fail_and_retry, 2, stage, calls_engine, WAYS)
