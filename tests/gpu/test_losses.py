"""On CUDA: stages 0-3 against the plain loops of the CPU tests, on one device and, if there are several, over NCCL."""

from __future__ import annotations

import pytest
import torch

from tests.parity.case import Case
from tests.parity.engine_run import train_stages
from tests.parity.plain import train_rank_by_rank
from tests.parity.test_losses import SCALE, STAGES, assert_ranks_agree, mean_losses

NUM_DEVICES = torch.cuda.device_count()
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}  # relative; kernels differ between batch shapes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_DEVICES == 0, reason="no CUDA device on this machine"),
]

needs_two = pytest.mark.skipif(NUM_DEVICES < 2, reason="NCCL takes one rank a device; this machine has fewer than two")


@pytest.mark.parametrize("clip", [0.0, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=needs_two)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_stage_has_the_losses_of_plain_pytorch(run_ranks, dtype, world_size, accumulation, clip) -> None:
    case = Case(dtype, world_size, accumulation, clip, loss_scale=SCALE[dtype], device="cuda")
    expected = torch.tensor(train_rank_by_rank(case).losses, dtype=torch.float64)
    by_rank = run_ranks(train_stages, world_size, case, STAGES, joins_world=False)
    for stage in STAGES:
        runs = [results[stage] for results in by_rank]
        losses = mean_losses(runs)
        worst = ((losses - expected).abs() / expected).max().item()
        assert worst <= TOLERANCE[dtype], f"stage {stage}: losses differ by {worst:.1e} relative"
        assert_ranks_agree(runs)
        assert losses[-1] < losses[0], f"stage {stage} does not learn"
