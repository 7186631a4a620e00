"""The worker pool itself: results, tracebacks, hangs, deaths, leaks, and what a test costs."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.pool import RanksFailed


def sum_of_ranks(start: float) -> tuple[int, int, float]:
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), float(total)


def variables() -> dict[str, str | None]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
    return {name: os.environ.get(name) for name in names} | {"threads": str(torch.get_num_threads())}


def join_by_variables() -> int:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    return dist.get_world_size()


def rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("only on rank one")
    dist.barrier()


def rank_one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()


def rank_one_dies() -> None:
    if dist.get_rank() == 1:
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


def leave_state_behind() -> None:
    import craken

    craken.left_behind = [*getattr(craken, "left_behind", []), 1]


def set_state_once() -> None:
    import craken

    craken.left_behind = []


def draw(num_before: int) -> float:
    torch.manual_seed(dist.get_rank())
    return float(torch.rand(num_before).sum())


def draw_first() -> float:
    return float(torch.rand(()))


def fail_to_pickle() -> object:
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_in_rank_order(run_ranks, world_size: int) -> None:
    expected = sum(10.0 + rank for rank in range(world_size))
    assert run_ranks(sum_of_ranks, world_size, 10.0) == [(rank, world_size, expected) for rank in range(world_size)]


def test_variables_are_a_launchers(run_ranks) -> None:
    first, second = run_ranks(variables, 2)
    assert (first["RANK"], first["WORLD_SIZE"], first["LOCAL_RANK"]) == ("0", "2", "0")
    assert (first["MASTER_ADDR"], first["OMP_NUM_THREADS"], first["threads"]) == ("127.0.0.1", "1", "1")
    assert second["RANK"] == second["LOCAL_RANK"] == "1"


def test_a_function_may_join_the_world_itself(run_ranks) -> None:
    assert run_ranks(join_by_variables, 2, joins_world=False) == [2, 2]


def test_a_failing_rank_shows_its_traceback_first_and_the_pool_goes_on(run_ranks) -> None:
    with pytest.raises(RanksFailed, match="only on rank one") as caught:
        run_ranks(rank_one_raises, 2)
    message = str(caught.value)
    assert message.index("KeyError") < message.index("---- rank 0 of 2 ----")
    assert [total for _, _, total in run_ranks(sum_of_ranks, 2, 0.0)] == [1.0, 1.0]


def test_a_hang_ends_with_the_stacks_of_all_ranks_and_a_fresh_pool(run_ranks) -> None:
    with pytest.raises(RanksFailed, match="did not finish in time") as caught:
        run_ranks(rank_one_sleeps, 2, timeout_s=1.0)
    assert "in rank_one_sleeps" in str(caught.value)
    assert "in barrier" in str(caught.value)
    assert [total for _, _, total in run_ranks(sum_of_ranks, 2, 0.0)] == [1.0, 1.0]


def test_a_death_names_rank_signal_and_last_words(run_ranks) -> None:
    with pytest.raises(RanksFailed, match="SIGSEGV") as caught:
        run_ranks(rank_one_dies, 2)
    assert "last words" in str(caught.value)
    assert [total for _, _, total in run_ranks(sum_of_ranks, 2, 0.0)] == [1.0, 1.0]


def test_global_state_left_behind_fails_the_test(run_ranks) -> None:
    run_ranks(set_state_once, 1)
    with pytest.raises(RanksFailed, match="left_behind"):
        run_ranks(leave_state_behind, 1)


def test_a_result_that_cannot_travel_is_an_error(run_ranks) -> None:
    with pytest.raises(RanksFailed, match="pickle"):
        run_ranks(fail_to_pickle, 1)


def test_a_function_without_a_name_is_refused(run_ranks) -> None:
    with pytest.raises(ValueError, match="module level"):
        run_ranks(lambda: None, 1)


def test_a_world_costs_tenths_of_a_second(run_ranks) -> None:
    run_ranks(sum_of_ranks, 2, 0.0)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run_ranks(sum_of_ranks, 2, 0.0)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_random_numbers_are_alike_on_all_ranks_whatever_ran_before(run_ranks) -> None:
    first = run_ranks(draw_first, 2)
    run_ranks(draw, 2, 7)
    assert run_ranks(draw_first, 2) == first == [first[0]] * 2
