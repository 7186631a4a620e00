"""Quantised collectives over real ranks: near the exact ones, alike on all ranks, and the bytes they save."""

from __future__ import annotations

from typing import Any

import pytest
import torch

NUMEL = 1024 + 32  # a shard; its last block is short
SCALES = 4 / 256  # bytes an element


def values_of(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size * NUMEL, generator=torch.Generator().manual_seed(rank)).to(dtype)


def gather(dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    from craken.comm import QuantisedGather, event_log, channel_over, world_axis

    axis = world_axis()
    carrier = QuantisedGather(channel_over(axis))
    full = torch.zeros(axis.size * NUMEL, dtype=dtype)
    mine = full[axis.rank * NUMEL : (axis.rank + 1) * NUMEL]
    mine.copy_(values_of(axis.rank, 1, dtype))
    with event_log() as events:
        carrier.all_gather(full, label="weights").wait()
    for rank in range(axis.size):
        exact, came = values_of(rank, 1, dtype).float(), full[rank * NUMEL : (rank + 1) * NUMEL].float()
        assert (came - exact).abs().max() <= exact.abs().max() / 254 * 1.01 + 2**-8 * exact.abs().max()
    return full, sum(event.bytes_sent for event in events)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_gather_the_same_bits_for_half_of_bf16(run_ranks, world_size, dtype) -> None:
    results = run_ranks(gather, world_size, dtype)
    for full, sent in results:
        assert torch.equal(full, results[0][0])
        assert sent == pytest.approx(NUMEL * (world_size - 1) * (1 + SCALES), rel=0.01)


def packed_data() -> None:
    from craken.comm import QuantisedGather, channel_over, world_axis

    axis = world_axis()
    full = torch.full((axis.size * 32,), axis.rank, dtype=torch.uint8)
    QuantisedGather(channel_over(axis)).all_gather(full, label="packed").wait()
    assert full.view(axis.size, -1).amax(1).tolist() == list(range(axis.size))


def test_what_is_no_float_travels_as_it_is(run_ranks) -> None:
    run_ranks(packed_data, 2)


def carrier_over(inner_size: int) -> Any:
    from craken.comm import QuantisedReduce, channel_over, split_axis, world_axis

    axis = world_axis()
    inner, outer = split_axis(axis, inner_size)
    return QuantisedReduce(channel_over(axis), channel_over(inner), channel_over(outer)), axis


def reduce(inner_size: int, dtype: torch.dtype) -> dict[str, int]:
    from craken.comm import event_log

    carrier, axis = carrier_over(inner_size)
    mine = slice(axis.rank * NUMEL, (axis.rank + 1) * NUMEL)
    full = values_of(axis.rank, axis.size, dtype)
    exact = sum(values_of(rank, axis.size, dtype)[mine].float() for rank in range(axis.size))
    outs = [torch.empty(NUMEL), torch.ones(NUMEL)]
    with event_log() as events:
        works = [carrier.reduce_scatter(full, full[mine], out, add=i == 1, label="g") for i, out in enumerate(outs)]
        for work in works:
            work.wait()
    step = 4.0 / 7  # of the largest value, about 4 standard deviations
    assert (outs[0] - exact).abs().max() <= step / 2 * axis.size * 1.5
    assert (outs[0] - exact).square().mean().sqrt() <= 0.25 * exact.square().mean().sqrt()
    torch.testing.assert_close(outs[1], outs[0] + 1)
    sent: dict[str, int] = {}
    for event in events:
        assert event.op == "all_to_all"
        sent[event.axis] = sent.get(event.axis, 0) + event.bytes_sent // len(outs)
    return sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "inner_size"), [(2, 2), (4, 4), (4, 2), (4, 1)])
def test_sums_take_a_quarter_of_bf16_a_hop(run_ranks, world_size, inner_size, dtype) -> None:
    a_shard = NUMEL * (0.5 + SCALES)
    nodes = world_size // inner_size
    expected = {"dp.inner": (inner_size - 1) * nodes * a_shard, "dp.outer": (nodes - 1) * a_shard}
    for sent in run_ranks(reduce, world_size, inner_size, dtype):
        assert set(sent) == {name for name, num_bytes in expected.items() if num_bytes}
        for name, num_bytes in sent.items():
            assert num_bytes == pytest.approx(expected[name], rel=0.03)


def overflow(inner_size: int) -> list[int]:
    carrier, axis = carrier_over(inner_size)
    full = torch.ones(axis.size * NUMEL, dtype=torch.float16)
    if axis.rank == 1:
        full[3] = float("inf")  # in rank 0's shard
    out = torch.empty(NUMEL)
    carrier.reduce_scatter(full, full[axis.rank * NUMEL : (axis.rank + 1) * NUMEL], out, add=False, label="g").wait()
    return [int(out[:256].isfinite().sum()), int(out[256:].isfinite().sum())]


@pytest.mark.parametrize("inner_size", [1, 2, 4])
def test_one_ranks_overflow_reaches_the_sum(run_ranks, inner_size) -> None:
    assert run_ranks(overflow, 4, inner_size) == [[0, NUMEL - 256]] + [[256, NUMEL - 256]] * 3
