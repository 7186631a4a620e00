"""Stages 0-3 against plain PyTorch: losses, gradient norms and weights over twenty steps.

fp32 agrees with one process on the concatenated batch to 1e-6 relative; sums are the only thing that differs in order.
bf16 and fp16 are held against a plain loop with the same casts and an fp32 master. What differs there is where a
sum of 16-bit gradients is rounded, and a master that lands on the other side of a rounding boundary moves a weight by
2^-9 (bf16) or 2^-11 (fp16) of itself: losses agree to TOLERANCE, relative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.parity.case import Case, Run
from tests.parity.engine_run import train_stages
from tests.parity.model import Traits
from tests.parity.plain import train_on_concatenated_batch, train_rank_by_rank

STAGES = [0, 1, 2, 3]
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 5e-4}
SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 1024.0}


@cache
def plain(case: Case) -> Run:
    return train_on_concatenated_batch(case) if case.dtype == "fp32" else train_rank_by_rank(case)


@pytest.fixture(scope="module")
def train_all_stages(run_ranks) -> Callable[[Case], list[dict[int, Run]]]:
    """Return `train(case) -> rank -> stage -> its run`; a case that several tests look at is trained once."""
    return cache(lambda case: run_ranks(train_stages, case.world_size, case, STAGES))


def mean_losses(runs: list[Run]) -> torch.Tensor:
    """Return the mean over ranks of each step's loss: [steps]."""
    return torch.tensor([run.losses for run in runs], dtype=torch.float64).mean(0)


def assert_ranks_agree(runs: list[Run]) -> None:
    for run in runs[1:]:
        for name, weight in runs[0].weights.items():
            assert torch.equal(weight, run.weights[name]), f"{name} differs between ranks"


@pytest.mark.parametrize("clip", [0.0, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_stage_has_the_losses_of_plain_pytorch(train_all_stages, dtype, world_size, accumulation, clip) -> None:
    case = Case(dtype, world_size, accumulation, clip, loss_scale=SCALE[dtype])
    expected = plain(case)
    by_rank = train_all_stages(case)
    for stage in STAGES:
        runs = [results[stage] for results in by_rank]
        losses = mean_losses(runs)
        reference = torch.tensor(expected.losses, dtype=torch.float64)
        worst = ((losses - reference).abs() / reference).max().item()
        assert worst <= TOLERANCE[dtype], f"stage {stage}: losses differ by {worst:.1e} relative"
        if clip:
            norms = torch.tensor(runs[0].norms)
            torch.testing.assert_close(norms, torch.tensor(expected.norms), rtol=10 * TOLERANCE[dtype], atol=0)
            assert norms.max() > clip, "clipping never bound: the case tests nothing"
        assert_ranks_agree(runs)
        assert losses[-1] < losses[0], f"stage {stage} does not learn"


@pytest.mark.parametrize("clip", [0.0, 1e6], ids=["unclipped", "clip that does not bind"])
@pytest.mark.parametrize("has_tied_head", [False, True])
def test_all_stages_equal_plain_pytorch_to_the_bit_at_accumulation_1(train_all_stages, has_tied_head, clip) -> None:
    case = Case(clip=clip, traits=Traits(has_tied_head=has_tied_head))
    assert_bit_equal(train_all_stages(case), train_rank_by_rank(case), STAGES)


def test_stages_0_and_1_equal_plain_pytorch_to_the_bit_at_accumulation_4(train_all_stages) -> None:
    case = Case(accumulation=4)
    assert_bit_equal(train_all_stages(case), train_rank_by_rank(case), [0, 1])


def test_stages_2_and_3_are_equal_to_the_bit_at_accumulation_4(train_all_stages) -> None:
    for results in train_all_stages(Case(accumulation=4)):
        assert results[2].losses == results[3].losses
        for name, weight in results[2].weights.items():
            assert torch.equal(results[3].weights[name], weight), f"{name} is not bit-equal"


def assert_bit_equal(by_rank: list[dict[int, Run]], expected: Run, stages: list[int]) -> None:
    for stage in stages:
        for results in by_rank:
            for name, weight in expected.weights.items():
                assert torch.equal(results[stage].weights[name], weight), f"stage {stage}: {name} is not bit-equal"
        # the mean of two numbers is exact up to one rounding, in whatever order
        assert mean_losses([results[stage] for results in by_rank]).tolist() == pytest.approx(
            expected.losses, rel=1e-15
        )


def test_a_second_run_repeats_the_first_to_the_bit(run_ranks, train_all_stages) -> None:
    case = Case("bf16", accumulation=4, clip=0.5)
    first, second = train_all_stages(case)[0][2], run_ranks(train_stages, 2, case, [2])[0][2]
    assert first.losses == second.losses
    assert all(torch.equal(weight, second.weights[name]) for name, weight in first.weights.items())
