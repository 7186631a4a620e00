"""Keys of the config that change how gradients are summed or steps are taken, each with what it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.parity.side_by_side import Pair, error, inputs, two_paths, value

SGD = {"type": "SGD", "params": {"lr": 0.125}}


def weights_after(stage: int, settings: dict[str, Any], steps: int = 2) -> list[torch.Tensor]:
    import craken

    model = two_paths()
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": SGD,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        **settings,
    }
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    dtype = next(model.parameters()).dtype
    for step in range(steps):
        engine.backward(error(engine(inputs(step, dist.get_rank()).to(dtype))))
        engine.step()
    found = [value(param).float() for param in model.parameters()]
    engine.destroy()
    return found


def beside(stage: int, settings: dict[str, Any], others: dict[str, Any], steps: int) -> None:
    for one, other in zip(weights_after(stage, settings, steps), weights_after(stage, others, steps), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("settings", [{"prescale_gradients": True}, {"gradient_predivide_factor": 4.0}], ids=str)
def test_dividing_before_the_sum_changes_nothing_but_its_range(run_ranks, stage, settings) -> None:
    run_ranks(beside, 2, stage, {}, settings, 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_sum_over_ranks_is_the_mean_times_their_number(run_ranks, stage) -> None:
    doubled = {"optimizer": {"type": "SGD", "params": {"lr": 0.25}}}
    run_ranks(beside, 2, stage, doubled, {"gradient_allreduce_op": "sum"}, 1)


def dtypes_that_travel(stage: int, settings: dict[str, Any]) -> set[torch.dtype]:
    from craken import comm

    with comm.event_log() as events:
        weights_after(stage, {"bf16": {"enabled": True}, **settings}, 1)
    return {event.dtype for event in events if event.op == "reduce_scatter"}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_travel_in_the_dtype_that_is_named(run_ranks, stage) -> None:
    assert run_ranks(dtypes_that_travel, 2, stage, {}) == [{torch.bfloat16}] * 2
    assert run_ranks(dtypes_that_travel, 2, stage, {"communication_data_type": "fp32"}) == [{torch.float32}] * 2


def overflow(stage: int, checks: bool) -> tuple[int, bool]:
    import craken

    model = two_paths()
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": SGD,
        "bf16": {"enabled": True, "check_grad_overflow": checks},
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.backward(error(engine(inputs(0, dist.get_rank()).bfloat16())) * float("inf"))
    engine.step()
    is_finite = all(bool(value(param).isfinite().all()) for param in model.parameters())
    skipped = engine.skipped_steps
    engine.destroy()
    return skipped, is_finite


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_steps_with_overflow_are_skipped_where_that_is_asked_for(run_ranks, stage) -> None:
    assert run_ranks(overflow, 2, stage, True) == [(1, True)] * 2
    assert run_ranks(overflow, 2, stage, False) == [(0, False)] * 2


def with_a_schedule_of_ones_own(stage: int) -> list[float]:
    model: nn.Module = two_paths()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    pair = Pair(stage, model, optimizer=optimizer, lr_scheduler=schedule, config={"gradient_accumulation_steps": 2})
    assert pair.engine.lr_scheduler is schedule
    rates = []
    for micro in range(8):
        pair.engine.backward(error(pair.engine(inputs(micro, pair.rank))))
        pair.engine.step()
        rates.append(pair.engine.get_lr()[0])
    pair.close()
    return rates


@pytest.mark.parametrize("stage", [0, 3])
def test_a_schedule_that_is_handed_in_advances_once_an_optimizer_step(run_ranks, stage) -> None:
    for rates in run_ranks(with_a_schedule_of_ones_own, 2, stage):
        assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25]
