"""A job that accumulates although its config says otherwise sums its gradients as one whose config says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parity.case import Case
from tests.parity.model import batch, tiny_gpt
from tests.parity.plain import weights_of

MICRO_BATCHES, STEPS = 4, 3
CASE = Case("bf16", accumulation=1)


def train(how: str, stage: int) -> dict[str, Tensor]:
    """Train in bf16 with four micro-batches a step, told to the engine in one of four ways; return the weights."""
    import craken

    model = tiny_gpt(CASE.traits)
    config: dict[str, Any] = CASE.config(stage)
    if how == "config":
        config["gradient_accumulation_steps"] = MICRO_BATCHES
        config.pop("train_batch_size", None)
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    if how == "batch size":
        engine.set_train_batch_size(engine.train_batch_size() * MICRO_BATCHES)
    for step in range(STEPS):
        for micro in range(MICRO_BATCHES):
            is_last = micro == MICRO_BATCHES - 1
            if how == "flag":
                engine.set_gradient_accumulation_boundary(is_last)
            loss = engine(batch(step, micro, dist.get_rank()))
            if how == "no_sync" and not is_last:
                with engine.no_sync():
                    engine.backward(loss / MICRO_BATCHES)
            else:
                engine.backward(loss if how in ("config", "batch size") else loss / MICRO_BATCHES)
            if how != "no_sync" or is_last:
                engine.step()
        engine.check_integrity()
    with craken.GatheredParameters(model.parameters()):
        weights = weights_of(model)
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    ("how", "stage"),
    [(how, stage) for how in ("flag", "batch size") for stage in (0, 1, 2, 3)] + [("no_sync", 0), ("no_sync", 1)],
)
def test_it_is_the_same_to_the_bit(run_ranks, how, stage) -> None:
    expected = run_ranks(train, 2, "config", stage)
    late = run_ranks(train, 2, how, stage)
    for mine, theirs in zip(late, expected, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def convert_in_the_middle(stage: int) -> list[Any]:
    """Leave accumulation to be found out after a first, already reduced, gradient of the step."""
    import craken

    model = tiny_gpt(CASE.traits)
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=CASE.config(stage))
    engine.backward(engine(batch(0, 0, dist.get_rank())))
    first = [group.gradients.own_reduced().clone() for group in engine.groups]
    engine.set_gradient_accumulation_boundary(False)
    for group, before in zip(engine.groups, first, strict=True):
        kept = group.gradients.own_reduced()
        assert kept.dtype == torch.float32
        assert torch.equal(kept, before.float())
    engine.backward(engine(batch(0, 1, dist.get_rank())))
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(batch(0, 2, dist.get_rank())))
    kept_and_more = [group.gradients.own_reduced() for group in engine.groups]
    assert any(not torch.equal(now, before.float()) for now, before in zip(kept_and_more, first, strict=True))
    engine.step()
    engine.check_integrity()
    engine.destroy()
    return [float(engine.get_global_grad_norm())]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_was_reduced_before_is_kept(run_ranks, stage) -> None:
    norms = run_ranks(convert_in_the_middle, 2, stage)
    reference = run_ranks(convert_in_the_middle, 2, 0)
    assert norms[0] == pytest.approx(reference[0], rel=1e-2)
