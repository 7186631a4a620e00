"""Splitting an axis in two: who is with whom, and what remains."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist


def split(inner_size: int) -> list[tuple[str, int, list[int]]]:
    from craken.comm import all_reduce_sum, gather_objects, split_axis, world_axis

    axes = split_axis(world_axis(), inner_size)
    again = split_axis(world_axis(), inner_size)
    assert [axis.group for axis in axes] == [axis.group for axis in again], "a second split made groups of its own"
    inner, outer = axes
    assert outer.rank * inner.size + inner.rank == dist.get_rank()
    for axis in axes:
        assert all_reduce_sum(torch.ones(1), axis, label="ones").item() == axis.size
    return [(axis.name, axis.rank, gather_objects(dist.get_rank(), axis)) for axis in axes]


@pytest.mark.parametrize("inner_size", [1, 2, 4])
def test_an_axis_splits_into_consecutive_ranks_and_their_counterparts(run_ranks, inner_size) -> None:
    for rank, (inner, outer) in enumerate(run_ranks(split, 4, inner_size)):
        first = rank - rank % inner_size
        assert inner == ("dp.inner", rank - first, list(range(first, first + inner_size)))
        assert outer == ("dp.outer", rank // inner_size, list(range(rank % inner_size, 4, inner_size)))


def split_badly() -> str:
    from craken.comm import split_axis, world_axis

    with pytest.raises(ValueError, match="divides") as caught:
        split_axis(world_axis(), 3)
    return str(caught.value)


def test_a_size_that_does_not_divide_is_refused_on_all_ranks(run_ranks) -> None:
    assert run_ranks(split_badly, 4) == [
        "expected a size that divides the 4 ranks of dp, got 3: choose one of [1, 2, 4]"
    ] * 4


def split_one_rank() -> list[tuple[str, int]]:
    from craken.comm import split_axis, world_axis

    return [(axis.name, axis.size) for axis in split_axis(world_axis(), 1)]


def test_a_world_of_one_rank_splits_too(run_ranks) -> None:
    assert run_ranks(split_one_rank, 1) == [[("dp.inner", 1), ("dp.outer", 1)]]
