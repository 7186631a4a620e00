"""The two collectives over real ranks: same numbers as their definition, on gloo point to point."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

NUMEL = 96  # a shard


def full_of(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size * NUMEL, generator=torch.Generator().manual_seed(rank)).to(dtype)


def exchange(dtype: torch.dtype) -> None:
    """Start several collectives at once, wait for them in another order, compare with the definition."""
    from craken.comm import event_log, transport_for, world_axis

    axis = world_axis()
    carrier = transport_for(axis)
    mine = slice(axis.rank * NUMEL, (axis.rank + 1) * NUMEL)
    fulls = [full_of(axis.rank, axis.size, dtype), full_of(axis.rank, axis.size, dtype) * 2]
    outs = [torch.empty(NUMEL), torch.ones(NUMEL)]
    gathered = torch.zeros(axis.size * NUMEL, dtype=dtype)
    gathered[mine] = axis.rank + 1
    with event_log() as events:
        works = [
            carrier.reduce_scatter(fulls[0], fulls[0][mine], outs[0], add=False, label="a"),
            carrier.all_gather(gathered, label="b"),
            carrier.reduce_scatter(fulls[1], fulls[1][mine], outs[1], add=True, label="c"),
        ]
        for work in reversed(works):
            work.wait()
    total = sum(full_of(rank, axis.size, dtype)[mine].float() for rank in range(axis.size))
    torch.testing.assert_close(outs[0], total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outs[1], 2 * total + 1, rtol=1e-6, atol=2e-6)
    assert gathered.tolist() == [float(rank + 1) for rank in range(axis.size) for _ in range(NUMEL)]
    assert [event.sent_numel for event in events] == ([NUMEL * (axis.size - 1)] * 3 if axis.size > 1 else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_collectives_do_what_they_say(run_ranks, world_size, dtype) -> None:
    run_ranks(exchange, world_size, dtype)


def sums_in_place() -> list[float]:
    from craken.comm import transport_for, world_axis

    axis = world_axis()
    full = torch.full((axis.size * NUMEL,), float(axis.rank + 1))
    own = full[axis.rank * NUMEL : (axis.rank + 1) * NUMEL]
    transport_for(axis).reduce_scatter(full, own, own, add=False, label="x").wait()
    return own.unique().tolist()


def test_a_shard_may_be_summed_into_its_own_place(run_ranks) -> None:
    assert run_ranks(sums_in_place, 4) == [[10.0]] * 4


def absent_peer() -> str:
    from datetime import timedelta

    from craken.comm import axis_over, transport_for

    axis = axis_over(dist.new_group(timeout=timedelta(seconds=1)))
    carrier = transport_for(axis)
    if axis.rank == 1:
        return ""
    with pytest.raises(RuntimeError, match="blocks.0") as caught:
        carrier.all_gather(torch.zeros(2 * NUMEL), label="blocks.0").wait()
    return str(caught.value)


def test_a_peer_that_does_not_come_is_an_error_with_the_collectives_name(run_ranks) -> None:
    message = run_ranks(absent_peer, 2)[0]
    assert "all-gather of blocks.0 did not complete" in message
    assert "called backward() or step() a different number of times" in message
