"""Control traffic over real ranks: the same answer everywhere, and never on a thread of gloo's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist


def talk() -> list[Any]:
    """Make every kind of control call; gloo's own collectives are out of reach meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        return _talk(patch)


def _talk(patch: pytest.MonkeyPatch) -> list[Any]:
    from craken.comm import all_reduce_sum, barrier, broadcast_object, gather_objects, world_axis

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective of gloo's runs on a thread that may outlive the interpreter")

    for name in ("all_reduce", "barrier", "all_gather_object", "broadcast_object_list"):
        patch.setattr(dist, name, refuse)
    axis = world_axis()
    thirds = torch.tensor([[axis.rank + 1 / 3, 0.1], [1.0, 2.0]], dtype=torch.float64)
    before = thirds.clone()
    answers = []
    for _ in range(3):
        barrier(axis)
        answers = [
            all_reduce_sum(thirds, axis, label="sum").tolist(),
            gather_objects({"rank": axis.rank, "long": "x" * 1000 * axis.rank}, axis),
            broadcast_object(("from", axis.rank), axis, source=axis.size - 1),
        ]
    assert torch.equal(thirds, before)
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gets_the_same_answer(run_ranks, world_size) -> None:
    everyones = run_ranks(talk, world_size)
    assert everyones == [everyones[0]] * world_size
    sums, objects, told = everyones[0]
    assert sums[1] == [world_size, 2 * world_size]
    assert sums[0][0] == pytest.approx(sum(range(world_size)) + world_size / 3)
    assert [thing["rank"] for thing in objects] == list(range(world_size))
    assert [len(thing["long"]) for thing in objects] == [1000 * rank for rank in range(world_size)]
    assert told == ("from", world_size - 1)


def in_halves() -> list[Any]:
    from craken.comm import axis_over, gather_objects, world_axis

    axis = world_axis()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = axis_over(halves[axis.rank // 2])
    talks = 1 + axis.rank // 2  # the halves make different numbers of calls
    within = [gather_objects(axis.rank, mine) for _ in range(talks)]
    return [within[-1], gather_objects(axis.rank, axis)]


def test_groups_of_ranks_talk_apart(run_ranks) -> None:
    whole = [0, 1, 2, 3]
    assert run_ranks(in_halves, 4) == [[[0, 1], whole]] * 2 + [[[2, 3], whole]] * 2
