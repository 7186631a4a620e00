"""Model states a rank holds, against the ZeRO paper's formulas, by what the allocator has given out.

Mixed precision with Adam, bytes for Psi parameters on N ranks, measured between the micro-batches of the second step,
when optimizer states exist and gradients are being accumulated:

    gradients kept in      stage 0    stage 1              stage 2              stage 3
    the compute dtype      16 Psi     4 Psi + 12 Psi/N     2 Psi + 14 Psi/N     16 Psi/N
    fp32                   18 Psi     6 Psi + 12 Psi/N     2 Psi + 16 Psi/N     18 Psi/N

Scratch that does not grow with the model (buffers of the exchange, Python) is taken out by measuring two models of
different size and dividing the difference by the difference in parameters.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.parity import heap

WIDTH, SMALL, LARGE = 512, 16, 40  # layers of 262,144 parameters; buckets of two layers

pytestmark = pytest.mark.skipif(not heap.can_count(), reason="needs glibc's mallinfo2")


def expected_bytes_per_parameter(stage: int, world_size: int, grad_bytes: int) -> float:
    full, sharded = {
        0: (14 + grad_bytes, 0),
        1: (2 + grad_bytes, 12),
        2: (2, 12 + grad_bytes),
        3: (0, 14 + grad_bytes),
    }[stage]
    return full + sharded / world_size


def bytes_held(num_layers: int, stage: int, accumulate_dtype: str | None, zero: dict[str, Any]) -> int:
    """Return what one rank holds between micro-batches of the second step, over what it held before."""
    import craken

    before = heap.bytes_in_use()
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 2 * WIDTH * WIDTH, **zero},
    }
    if accumulate_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": accumulate_dtype}
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16)
    for _ in range(3):  # a whole step and the first half of another
        engine.backward(engine(x).square().mean())
        engine.step()
    held = heap.bytes_in_use() - before
    engine.backward(engine(x).square().mean())  # no rank leaves in mid-step
    engine.step()
    engine.destroy()
    return held


def bytes_per_parameter(stage: int, accumulate_dtype: str | None, **zero: Any) -> float:
    bytes_held(2, stage, accumulate_dtype, zero)  # imports, threads and caches
    small, large = (bytes_held(num_layers, stage, accumulate_dtype, zero) for num_layers in (SMALL, LARGE))
    dist.barrier()
    return (large - small) / ((LARGE - SMALL) * WIDTH * WIDTH)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("world_size", "accumulate_dtype", "grad_bytes"),
    [(2, None, 4), (2, "fp32", 4), (2, "bf16", 2), (4, None, 4), (4, "bf16", 2)],
)
def test_model_states_take_what_the_paper_says(run_ranks, stage, world_size, accumulate_dtype, grad_bytes) -> None:
    expected = expected_bytes_per_parameter(stage, world_size, grad_bytes)
    for measured in run_ranks(bytes_per_parameter, world_size, stage, accumulate_dtype):
        assert measured == pytest.approx(expected, rel=0.03)


MICS, HPZ = {"mics_shard_size": 2}, {"zero_hpz_partition_size": 2}
LOCO = {"zero_quantized_gradients": True, "zeropp_loco_param": {}}


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (MICS, 18 / 2),
        (HPZ, 18 / 4 + 2 / 2),
        ({"zero_quantized_weights": True, "zero_quantized_gradients": True}, 18 / 4),
        (LOCO, 18 / 4 + (1 + 1 / 64) * 3 / 4),
    ],
    ids=["mics", "hpz", "quantised", "error feedback"],
)
def test_model_states_on_4_ranks_take_what_each_mesh_and_transport_says(run_ranks, zero, expected) -> None:
    for measured in run_ranks(bytes_per_parameter, 4, 3, None, **zero):
        assert measured == pytest.approx(expected, rel=0.03)


def heap_sees_a_tensor() -> tuple[int, int]:
    gc.collect()
    before = heap.bytes_in_use()
    kept = torch.empty(1 << 20)
    grown = heap.bytes_in_use() - before
    del kept
    return grown, heap.bytes_in_use() - before


def test_the_ruler_counts_a_tensor_and_its_end(run_ranks) -> None:
    ((grown, left),) = run_ranks(heap_sees_a_tensor, 1)
    assert grown == pytest.approx(4 << 20, rel=0.01)
    assert abs(left) < 0.02 * (4 << 20)
