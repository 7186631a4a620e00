"""Ranks that were started with another model or config are named before the first step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

PLAIN = {"train_micro_batch_size_per_gpu": 1}
CONFIG = {**PLAIN, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def start(odd_rank: int, odd_config: dict, width: int, frozen: bool) -> str:
    import craken

    is_odd = dist.get_rank() == odd_rank
    model = nn.Sequential(nn.Linear(4, width if is_odd else 4), nn.Linear(width if is_odd else 4, 2))
    if is_odd and frozen:
        model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="all ranks must be started") as caught:
        craken.initialize(model=model, config={**CONFIG, **odd_config} if is_odd else CONFIG)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "width", "frozen", "difference"),
    [
        ({"zero_optimization": {"stage": 1}}, 4, False, "rank 2: zero_optimization.stage is 1, on rank 0 it is absent"),
        ({"gradient_clipping": 0.5}, 4, False, "rank 2: gradient_clipping is 0.5, on rank 0 it is absent"),
        ({}, 5, False, "rank 2: the model: parameter 0.weight (5, 4) float32 trainable, on rank 0 parameter 0.weight (4, 4)"),
        (
            {},
            4,
            True,
            "rank 2: the model: parameter 0.bias (4,) float32 frozen, on rank 0 parameter 0.bias (4,) float32 trainable",
        ),
    ],
    ids=["stage", "clipping", "shape", "frozen"],
)
def test_every_rank_raises_the_same_message_naming_who_and_what(run_ranks, config, width, frozen, difference) -> None:
    messages = run_ranks(start, 4, 2, config, width, frozen)
    assert len(set(messages)) == 1
    assert "rank(s) 2 of 4 differ from rank 0" in messages[0]
    assert difference in messages[0]


def start_training(odd_rank: int, what: str) -> str:
    import craken

    is_odd = dist.get_rank() == odd_rank
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if is_odd and what == "class":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if is_odd and what == "options":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if is_odd and what == "members":
        optimizer = torch.optim.AdamW(list(model.parameters())[1:], lr=1e-3)
    samples = torch.zeros(9 if is_odd and what == "samples" else 12, 4)
    with pytest.raises(ValueError, match="all ranks must be started") as caught:
        craken.initialize(model=model, optimizer=optimizer, training_data=TensorDataset(samples), config=PLAIN)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "difference"),
    [
        ("class", "rank 1: the optimizer is SGD, on rank 0 it is AdamW"),
        ("options", "rank 1: the optimizer's groups: group 0 with {'lr': 0.01"),
        (
            "members",
            "the optimizer's groups: group 0, parameter of shape (4,), on rank 0 group 0, parameter of shape (4, 4)",
        ),
        ("samples", "rank 1: the number of training samples is 9, on rank 0 it is 12"),
    ],
)
def test_ranks_that_train_with_something_else_are_named(run_ranks, what, difference) -> None:
    messages = run_ranks(start_training, 2, 1, what)
    assert len(set(messages)) == 1
    assert difference in messages[0]


def paths_may_differ() -> None:
    import craken

    config = {**CONFIG, "csv_monitor": {"enabled": False, "output_path": f"rank{dist.get_rank()}"}}
    engine, *_ = craken.initialize(model=nn.Linear(2, 2), config=config)
    engine.destroy()


def test_places_to_write_to_may_differ(run_ranks) -> None:
    run_ranks(paths_may_differ, 2)


def weights_after_start() -> list[float]:
    import craken

    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, float(dist.get_rank() + 1))
    model.register_buffer("seen", model.weight.new_full((3,), float(dist.get_rank())))
    engine, *_ = craken.initialize(model=model, config=CONFIG)
    engine.destroy()
    return [*model.weight.flatten().tolist(), *model.seen.tolist()]


def test_rank_0_gives_weights_and_buffers_to_all(run_ranks) -> None:
    assert run_ranks(weights_after_start, 4) == [[1.0, 1.0, 0.0, 0.0, 0.0]] * 4


def start_alone(wrong: dict) -> str:
    """Return what rank 1 is told, while rank 0 never comes."""
    import craken

    if dist.get_rank() == 0:
        return ""
    with pytest.raises(ValueError) as caught:
        craken.initialize(model=nn.Linear(4, 2), config={**CONFIG, **wrong})
    return str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": {"type": "FooBar"}}, "optimizer.type: expected a known name"),
        ({"optimizer": {"type": "LBFGS"}}, "LBFGS"),
        ({"optimizer": {"type": "AdamW", "params": {"foobar": 1}}}, "foobar"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1.5]}}}, "betas"),
        ({"scheduler": {"type": "FooLR"}}, "scheduler.type: expected a known name"),
        ({"scheduler": {"type": "ReduceLROnPlateau"}}, "metric"),
        ({"scheduler": {"type": "StepLR", "params": {"step": 3}}}, "step"),
        ({"train_micro_batch_size_per_gpu": None}, "train_batch_size"),
        ({"train_batch_size": 7, "gradient_accumulation_steps": 2}, "2 data-parallel ranks = 4, got 7"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 3}}, "mics_shard_size"),
    ],
)
def test_what_is_wrong_in_a_config_is_said_in_one_line_before_ranks_meet(run_ranks, wrong, message) -> None:
    told = run_ranks(start_alone, 2, wrong)[1]
    assert message in told
    assert "\n" not in told
