"""Ranks that wait for each other for good all raise; ranks that wait for a slow one go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craken.comm.watchdog import Waiting, explain, is_deadlock
from tests.parity.side_by_side import inputs


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    from craken.comm import watchdog

    before, watchdog.PATIENCE_S = watchdog.PATIENCE_S, seconds
    try:
        yield
    finally:
        watchdog.PATIENCE_S = before


def waiting(rank: int, what: str, members: list[int]) -> Waiting:
    return Waiting(what, what, members, rank, members[0], "", 0, 0, is_sent=False, number=0, beat=0)


def test_ranks_that_all_wait_for_one_call_are_no_deadlock() -> None:
    everybody = [0, 1, 2, 3]
    assert not is_deadlock([waiting(rank, "a", everybody) for rank in everybody])
    assert is_deadlock([waiting(rank, "a" if rank else "b", everybody) for rank in everybody])
    pairs = [waiting(0, "a", [0, 1]), waiting(1, "b", [1, 3]), waiting(2, "c", [2, 3]), waiting(3, "c", [2, 3])]
    assert not is_deadlock(pairs), "ranks 2 and 3 will go on"
    ring = [waiting(rank, str(rank), [rank, (rank + 1) % 4]) for rank in everybody]
    assert is_deadlock(ring)


def test_the_verdict_names_ranks_and_calls() -> None:
    told = explain([waiting(0, "all-gather of a", [0, 1, 2]), *(waiting(r, "sum", [0, 1, 2]) for r in (1, 2))])
    assert "rank 0 for the all-gather of a; ranks 1, 2 for the sum" in told


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, goes_left: bool) -> Tensor:
        return (self.left if goes_left else self.right)(self.first(x))


def go_apart(engine: Any, how: str, *, is_first: bool) -> None:
    if how == "forward":
        engine(inputs(1, 0), goes_left=is_first)
    elif is_first:
        engine.backward(engine(inputs(1, 0), goes_left=True).sum())
        engine.step()
    else:
        engine(inputs(1, 0), goes_left=True)
        engine(inputs(2, 0), goes_left=True)


def branch(how: str) -> float:
    """The first rank goes another way than the others: in a forward, or it steps while they run forwards."""
    import craken

    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    with patience(1.0):
        engine, *_ = craken.initialize(model=Branches(), config=config)
        if how != "forward":
            engine.backward(engine(inputs(0, 0), goes_left=True).sum())
            engine.step()
        begin_s = time.monotonic()
        with pytest.raises(RuntimeError) as raised:
            go_apart(engine, how, is_first=engine.parts.axis.rank == 0)
    took_s = time.monotonic() - begin_s
    said = str(raised.value)
    assert "the ranks wait for each other" in said, said
    assert "set_z3_leaf_modules" in said
    if how == "forward":
        assert "left.weight" in said
        assert "right.weight" in said
    engine.destroy()
    return took_s


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("how", ["forward", "backward"])
def test_ranks_that_go_different_ways_all_raise_and_name_the_modules(run_ranks, how, world_size) -> None:
    took_s = run_ranks(branch, world_size, how)
    assert max(took_s) < 10


def go_on() -> float:
    from craken.comm import all_reduce_sum, transport_for, world_axis

    axis = world_axis()
    transport = transport_for(axis)
    full = torch.full((axis.size * 32,), float(axis.rank))
    with patience(0.2):
        transport.all_gather(full.clone(), label="weights").wait()
        if axis.rank == 1:
            time.sleep(1.5)
        transport.all_gather(full, label="more weights").wait()
        if axis.rank == 0:
            time.sleep(1.0)
        total = all_reduce_sum(torch.ones(1), axis, label="votes")
    assert full.tolist() == [float(index // 32) for index in range(full.numel())]
    return float(total)


def test_a_slow_rank_is_waited_for(run_ranks) -> None:
    assert run_ranks(go_on, 2) == [2.0, 2.0]


def test_workers_survive_a_verdict(run_ranks) -> None:
    run_ranks(branch, 2, "forward")
    assert run_ranks(go_on, 2) == [2.0, 2.0]
