"""Gradients of an unfinished accumulation: saved if asked for, and the step goes on to the bit on the same ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.dist.test_resume import start, whole_state

ACCUMULATION, DONE, ALL = 3, 5, 9  # micro-batches: a step and two of the next are done


def begin(stage: int, precision: str, seed: int, **sections: Any) -> tuple[Any, Iterator[Any]]:
    from craken.engine import RepeatingLoader

    sections = {"gradient_accumulation_steps": ACCUMULATION, "gradient_clipping": 0.5, **sections}
    engine, _, loader, _ = start(stage, precision, seed, checkpoint={"save_gradients": True}, **sections)
    return engine, iter(RepeatingLoader(loader))


def micro_batches(engine: Any, batches: Iterator[Any], first: int, end: int, *, by_flag: bool) -> list[float]:
    """Run micro-batches; `by_flag` as accelerate does, which calls `step` at boundaries alone."""
    losses = []
    for number in range(first, end):
        x, y = next(batches)
        is_boundary = (number + 1) % ACCUMULATION == 0
        if by_flag:
            engine.set_gradient_accumulation_boundary(is_boundary)
        loss = F.cross_entropy(engine(x.to(engine.first.weight.dtype)).float(), y)
        engine.backward(loss)
        if is_boundary or not by_flag:
            engine.step()
        losses.append(loss.item())
    return losses


def save_within_a_step(folder: str, stage: int, precision: str, by_flag: bool = False, **sections: Any) -> None:
    if by_flag:
        sections["gradient_accumulation_steps"] = 1
    engine, batches = begin(stage, precision, seed=0, **sections)
    micro_batches(engine, batches, 0, DONE, by_flag=by_flag)
    engine.save_checkpoint(folder)
    expected = micro_batches(engine, batches, DONE, ALL, by_flag=by_flag)
    norm, weights = engine.get_global_grad_norm(), whole_state(engine)
    engine.destroy()

    engine, _ = begin(stage, precision, seed=99, **sections)
    engine.load_checkpoint(folder)
    from craken.engine import RepeatingLoader

    batches = iter(RepeatingLoader(engine.training_dataloader))
    assert micro_batches(engine, batches, DONE, ALL, by_flag=by_flag) == expected
    assert engine.get_global_grad_norm() == norm
    for name, value in whole_state(engine).items():
        assert torch.equal(value, weights[name]), name
    engine.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_goes_on_to_the_bit(run_ranks, tmp_path, stage, precision) -> None:
    run_ranks(save_within_a_step, 2, str(tmp_path), stage, precision)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_whose_boundary_the_client_sets_goes_on_to_the_bit(run_ranks, tmp_path, stage) -> None:
    run_ranks(save_within_a_step, 2, str(tmp_path), stage, "fp32", by_flag=True)


def save_with_states_on_a_host_apart(folder: str, stage: int) -> None:
    """As on an accelerator: sums leave for the host as they come."""
    from craken.engine import offload
    from craken.zero import Link

    zero = {"stage": stage, "reduce_bucket_size": 100, "offload_optimizer": {"device": "cpu"}}
    with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
        save_within_a_step(folder, stage, "bf16", zero_optimization=zero)


@pytest.mark.parametrize("stage", [2, 3])
def test_sums_that_wait_on_the_host_are_saved_too(run_ranks, tmp_path, stage) -> None:
    run_ranks(save_with_states_on_a_host_apart, 2, str(tmp_path), stage)


def test_sums_that_replicas_have_not_shared_are_saved_too(run_ranks, tmp_path) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 100, "mics_shard_size": 2, "stage3_param_persistence_threshold": 20}
    run_ranks(save_within_a_step, 4, str(tmp_path), 3, "fp32", zero_optimization=zero)


def save_between_backward_and_step(folder: str) -> None:
    engine, batches = begin(2, "fp32", seed=0)
    micro_batches(engine, batches, 0, ACCUMULATION - 1, by_flag=False)
    x, y = next(batches)
    engine.backward(F.cross_entropy(engine(x), y))
    engine.save_checkpoint(folder)
    engine.step()
    norm, weights = engine.get_global_grad_norm(), whole_state(engine)
    engine.destroy()
    engine, _ = begin(2, "fp32", seed=99)
    engine.load_checkpoint(folder)
    engine.step()
    assert engine.global_steps == 1
    assert engine.get_global_grad_norm() == norm
    for name, value in whole_state(engine).items():
        assert torch.equal(value, weights[name]), name
    engine.destroy()


def test_saved_between_backward_and_step_the_step_follows(run_ranks, tmp_path) -> None:
    run_ranks(save_between_backward_and_step, 2, str(tmp_path))


def save_part_of_a_step(folder: str) -> None:
    engine, batches = begin(2, "fp32", seed=0)
    micro_batches(engine, batches, 0, DONE, by_flag=False)
    engine.save_checkpoint(folder)
    engine.destroy()


def load_elsewhere(folder: str, stage: int, checkpoint: str) -> tuple[int, int, list[bool]]:
    engine, batches = begin(stage, "fp32", seed=3)
    engine.load_checkpoint(folder, tag=checkpoint)
    in_step, held = engine.accumulation.in_step, [group.gradients.has_any for group in engine.groups]
    micro_batches(engine, batches, 0, ACCUMULATION, by_flag=False)
    engine.check_integrity()
    steps = engine.global_steps
    engine.destroy()
    return in_step, steps, held


@pytest.mark.parametrize(("stage", "world_size"), [(3, 2), (1, 2), (2, 1), (2, 4)])
def test_at_another_stage_or_on_other_ranks_the_step_begins_anew(run_ranks, tmp_path, stage, world_size) -> None:
    run_ranks(save_part_of_a_step, 2, str(tmp_path))
    for in_step, steps, held in run_ranks(load_elsewhere, world_size, str(tmp_path), stage, "global_step1"):
        assert (in_step, steps) == (0, 2)
        assert not any(held)


def save_at_a_boundary(folder: str) -> None:
    engine, batches = begin(2, "fp32", seed=0)
    micro_batches(engine, batches, 0, ACCUMULATION, by_flag=False)
    engine.save_checkpoint(folder)
    engine.destroy()
    engine, _ = begin(2, "fp32", seed=9)
    engine.load_checkpoint(folder)
    with pytest.raises(RuntimeError, match=r"step\(\) before backward\(\)"):
        engine.step()
    engine.destroy()


def test_saved_at_a_boundary_nothing_is_taken_back(run_ranks, tmp_path) -> None:
    run_ranks(save_at_a_boundary, 2, str(tmp_path))
