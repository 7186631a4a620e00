"""Every optimizer on shards gives the weights it gives on whole parameters in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.side_by_side import Pair, two_paths

SECTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "Adam": {"lr": 1e-2, "weight_decay": 0.1, "adam_w_mode": False},
    "SGD": {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1},
    "Adagrad": {"lr": 1e-2},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
    "Lamb": {"lr": 1e-2, "weight_decay": 0.1},
    "Muon": {"lr": 1e-2, "weight_decay": 0.1},
}


class Deep(nn.Module):
    """Matrices of several shapes, so that ranks get unequal shares of them, and biases."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        linears = [nn.Linear(*sizes, bias=bias) for sizes in ((6, 9), (9, 4), (4, 5))]
        self.layers = nn.Sequential(linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def deep(bias: bool = True) -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Deep(bias)


def by_config(name: str, stage: int) -> None:
    from craken.optim import build_optimizer

    model = deep()
    section = {"type": name, "params": SECTIONS[name]}
    pair = Pair(stage, model, model_parameters=model.parameters(), config={"optimizer": section})
    names = {param: fqn for fqn, param in pair.twin.named_parameters()}
    pair.twin_optimizer = build_optimizer(name, SECTIONS[name], list(pair.twin.parameters()), param_names=names)
    for step in range(4):
        pair.step_both(step)
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", list(SECTIONS))
def test_an_optimizer_of_the_config_is_right_across_shards(run_ranks, name, stage, world_size) -> None:
    run_ranks(by_config, world_size, name, stage)


def handed_in(name: str, stage: int, options: dict[str, Any]) -> None:
    model = deep(bias=name != "Muon")  # torch's takes matrices alone
    pair = Pair(stage, model, optimizer=getattr(torch.optim, name)(model.parameters(), **options))
    pair.twin_optimizer = getattr(torch.optim, name)(pair.twin.parameters(), **options)
    for step in range(4):
        pair.step_both(step)
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adafactor", "Muon"])
def test_an_optimizer_handed_in_is_right_across_shards(run_ranks, name, stage) -> None:
    run_ranks(handed_in, 2, name, stage, {"lr": 1e-2})


def by_callable(stage: int) -> None:
    model = two_paths()
    pair = Pair(stage, model, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5))
    pair.twin_optimizer = torch.optim.SGD(pair.twin.parameters(), lr=0.1, momentum=0.5)
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_callable_builds_the_optimizer(run_ranks, stage) -> None:
    run_ranks(by_callable, 2, stage)


def refused(stage: int) -> None:
    model = two_paths()
    with pytest.raises(ValueError, match="LBFGS"):
        Pair(stage, model, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_optimizer_that_cannot_work_on_shards_is_refused_by_name(run_ranks, stage) -> None:
    run_ranks(refused, 2, stage)
