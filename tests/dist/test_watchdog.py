"""Ranks that wait for each other for good all raise; ranks that wait for a slow one go on.

NCCL's part is played by gloo's own collectives, with works that wait as a synchronisation with NCCL's kernels does:
until the collective is done, or its group has been aborted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from craken.comm.deadlock import Waiting, explain, is_deadlock, parting
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
    return Waiting(what, what, members, rank, number=0, beat=0)


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


def test_where_ranks_went_apart_is_told_if_all_remember() -> None:
    def after(rank: int, at: int, *past: str) -> Waiting:
        return waiting(rank, past[-1], [0, 1])._replace(group="g", at=at, past=past)

    waits = [after(0, 7, "a", "b", "c", "d"), after(1, 6, "a", "x", "c")]
    assert [wait.what for wait in parting(waits)] == ["b", "x"]
    assert "rank 1 for the c; they went apart before that: rank 0 for the b; rank 1 for the x." in explain(waits)
    assert parting([waits[0], waits[0]]) == []
    assert parting([waits[0], waits[1]._replace(group="h")]) == []
    assert parting([waits[0], waiting(1, "a message", [0, 1])]) == []


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


class Kernel:
    """A work whose `wait` returns with the collective, or when the device has been told to give it up."""

    def __init__(self, work: dist.Work, given_up: threading.Event) -> None:
        self._work, self._given_up = work, given_up
        self._result: torch.futures.Future[int] = torch.futures.Future()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(RuntimeError):  # an unmatched one ends with its group's timeout; a kernel would not
            self._work.wait()
            self._result.set_result(0)

    def get_future_result(self) -> torch.futures.Future[int]:
        return self._result

    def wait(self) -> None:
        while not self._result.done() and not self._given_up.is_set():
            time.sleep(0.001)


@contextmanager
def own_collectives() -> Iterator[Any]:
    """Have the backend's own collectives carry everything but control messages; yields such a transport."""
    from craken.comm import transport, watchdog
    from craken.comm.mesh import axis_over

    given_up = threading.Event()
    # what a test leaves unmatched ends by itself, for a group can't be taken down before
    axis = axis_over(dist.new_group(timeout=timedelta(seconds=5)))
    axis.__dict__["backend"] = "nccl"

    def on_device(collective: Callable[..., dist.Work]) -> Callable[..., Kernel]:
        return lambda *args, **kwargs: Kernel(collective(*args, **kwargs), given_up)

    with ExitStack() as stack:
        for name in ("reduce_scatter_single", "all_gather_single"):
            stack.enter_context(patch.object(transport, name, on_device(getattr(transport, name))))
        stack.enter_context(patch.object(dist, "all_to_all_single", on_device(dist.all_to_all_single)))
        stack.enter_context(patch.object(watchdog, "_abort", lambda group: given_up.set()))
        for module in ("craken.comm.transport", "craken.engine.wiring", "craken.zero.building.sharder"):
            stack.enter_context(patch(f"{module}.transport_for", lambda _: transport.Native(axis)))
        yield transport.Native(axis)


class Depths(nn.Module):
    """A model that can skip its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, num_layers: int = 3) -> Tensor:
        for layer in (self.first, self.second, self.last)[:num_layers]:
            x = layer(x)
        return x


def skip(how: str) -> tuple[float, str]:
    """The second rank skips a layer, and meets the others in a control message or goes into backward without it."""
    import craken
    from craken.comm import barrier

    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    with own_collectives() as native, patience(0.5):
        engine, *_ = craken.initialize(model=Depths(), config=config)
        skips = engine.parts.axis.rank == 1
        begin_s = time.monotonic()
        with pytest.raises(RuntimeError, match="the ranks wait for each other") as raised:
            loss = engine(inputs(0, 0), num_layers=2 if skips else 3).sum()
            if skips and how == "control":
                barrier(engine.parts.axis)
            engine.backward(loss)
            engine.step()
        took_s = time.monotonic() - begin_s
        with pytest.raises(RuntimeError, match="the ranks wait for each other"):
            native.all_gather(torch.zeros(2), label="nothing")
        engine.destroy()
    return took_s, str(raised.value)


@pytest.mark.parametrize("how", ["control", "backward"])
def test_a_skipped_module_is_found_with_the_backends_own_collectives(run_ranks, how) -> None:
    for took_s, said in run_ranks(skip, 2, how):
        assert took_s < 8
        # the backend pairs gathers by their order, so the ranks go on for a while where the next calls are gathers too
        apart = said.split("they went apart before that: ")[-1]
        assert "rank 0 for the all-gather of last.weight" in apart, said
        assert "rank 1 for " + ("a barrier" if how == "control" else "the all-gather of second.weight") in apart, said


def go_on_alone() -> tuple[int, list[float]]:
    """The second rank is late for a collective, the first one in a long computation that was started before another."""
    from craken.comm import watchdog, world_axis

    axis = world_axis()
    with own_collectives() as native, patience(0.2):
        fulls = [torch.full((axis.size * 8,), float(axis.rank)) for _ in range(50)]
        if axis.rank == 1:
            time.sleep(1.5)
        pending = [native.all_gather(full, label=str(at)) for at, full in enumerate(fulls)]
        if axis.rank == 0:
            time.sleep(1.0)
        for work in pending:
            work.wait()
        total = torch.zeros(8)
        native.reduce_scatter(fulls[0], fulls[0][:8], total, add=False, label="sum").wait()
        native.all_gather(fulls[0], label="last").wait()
        num_kept = len(watchdog._watchdog._calls)
    assert all(full.tolist() == [0.0] * 8 + [1.0] * 8 for full in fulls[1:])
    return num_kept, total.unique().tolist()


def test_a_slow_rank_is_waited_for_with_the_backends_own_collectives_and_none_is_kept(run_ranks) -> None:
    (first_kept, first), (second_kept, second) = run_ranks(go_on_alone, 2)
    assert (first, second) == ([0.0], [2.0])
    assert max(first_kept, second_kept) <= 2
