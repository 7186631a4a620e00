"""fp16: an overflow on one rank makes every rank skip, the scale moves as described, and training goes on."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.parity.plain import dynamic_scales
from tests.parity.side_by_side import ADAMW, error, inputs, two_paths, value

OVERFLOWS = [False, True, True, False, False, True, False, False, False, False, True, False]
WINDOW, START_POWER = 3, 4


class Seen(NamedTuple):
    scale: float
    moved: bool
    overflow: bool
    num_skipped: int


def run_with_overflows(stage: int, hysteresis: int) -> list[Seen]:
    """Step once for each of OVERFLOWS, rank 1 alone having the overflow; return what the engine says each time."""
    import craken

    model = two_paths()
    fp16 = {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": START_POWER,
        "loss_scale_window": WINDOW,
        "hysteresis": hysteresis,
    }
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": ADAMW,
        "fp16": fp16,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20},
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,
    }
    engine, optimizer, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    seen = []
    for step, has_overflow in enumerate(OVERFLOWS):
        before = value(model.left.weight)
        loss = error(engine(inputs(step, dist.get_rank()).half()))
        if has_overflow and dist.get_rank() == 1:
            loss = loss * float("inf")
        engine.backward(loss)
        engine.step()
        moved = not torch.equal(before, value(model.left.weight))
        seen.append(Seen(optimizer.cur_scale, moved, optimizer.overflow, engine.skipped_steps))
    engine.destroy()
    return seen


@pytest.mark.parametrize("hysteresis", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_on_one_rank_is_skipped_by_all_and_moves_the_scale(run_ranks, stage, hysteresis) -> None:
    first, second = run_ranks(run_with_overflows, 2, stage, hysteresis)
    assert first == second
    assert [seen.overflow for seen in first] == OVERFLOWS
    assert [seen.moved for seen in first] == [not has_overflow for has_overflow in OVERFLOWS]
    assert [seen.num_skipped for seen in first] == [sum(OVERFLOWS[: at + 1]) for at in range(len(OVERFLOWS))]
    scales = dynamic_scales(OVERFLOWS, start=2.0**START_POWER, window=WINDOW, hysteresis=hysteresis)
    assert [seen.scale for seen in first] == list(scales)


def scale_bare_loss(stage: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the weights after three steps through engine.backward, and through engine.scale(loss).backward()."""
    import craken

    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 2,
        "optimizer": ADAMW,
        "fp16": {"enabled": True, "loss_scale": 64},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,
    }
    weights = []
    for is_bare in (False, True):
        model = two_paths()
        engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
        for micro in range(6):
            loss = error(engine(inputs(micro, dist.get_rank()).half()))
            if is_bare:
                engine.scale(loss).backward()
            else:
                engine.backward(loss)
            engine.step()
        weights.append([value(param) for param in model.parameters()])
        engine.destroy()
    return weights[0], weights[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_scaled_bare_backward_is_the_engines_backward(run_ranks, stage) -> None:
    for ours, bare in run_ranks(scale_bare_loss, 2, stage):
        for expected, weight in zip(ours, bare, strict=True):
            torch.testing.assert_close(weight, expected, rtol=2e-3, atol=1e-4)


def joint_backward(second_power: int, second_accumulation: int) -> list[float]:
    """One fp16 loss through two engines, the second with another loss scale and accumulation count."""
    import craken

    engines = []
    for power, accumulation in ((4, 1), (second_power, second_accumulation)):
        config = {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": accumulation,
            "optimizer": ADAMW,
            "fp16": {"enabled": True, "initial_scale_power": power},
            "zero_optimization": {"stage": 2},
            "steps_per_print": 10**9,
            "gradient_clipping": 0.0,
        }
        model = two_paths()
        engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
        engines.append(engine)
    first, second = engines
    x = inputs(0, dist.get_rank()).half()
    for _ in range(second_accumulation):
        first.backward(error(first(x)) + error(second(x)))
        second.step()
    first.step()
    norms = [engine.get_global_grad_norm() for engine in engines]
    for engine in engines:
        engine.destroy()
    return [float(norm) for norm in norms]


@pytest.mark.parametrize(("power", "accumulation"), [(4, 1), (7, 1), (4, 2), (2, 2)])
def test_a_joint_backward_gives_each_engine_its_own_scale(run_ranks, power, accumulation) -> None:
    norms = run_ranks(joint_backward, 2, power, accumulation)[0]
    # the same model and loss: the first engine counts every micro-batch, the second averages over its own
    assert norms[0] == pytest.approx(accumulation * norms[1], rel=1e-2)
