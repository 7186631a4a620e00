"""Which groups one call of the optimizer updates."""

from __future__ import annotations

import sys

from craken.zero.memory.placement import Place
from craken.zero.plans.chunks import Share, plan_chunks


def sizes(*numels: int, place: Place = Place.DEVICE) -> list[Share]:
    return [Share(numel, place) for numel in numels]


def test_at_most_an_eighth_of_the_groups_goes_at_a_time() -> None:
    assert [len(chunk) for chunk in plan_chunks(sizes(*[1] * 24), max_numel=sys.maxsize)] == [3] * 8
    assert [len(chunk) for chunk in plan_chunks(sizes(*[1] * 5), max_numel=sys.maxsize)] == [1] * 5


def test_a_run_of_several_stays_below_the_most_elements() -> None:
    chunks = plan_chunks(sizes(*[10] * 32), max_numel=25)
    assert [list(chunk) for chunk in chunks] == [[at, at + 1] for at in range(0, 32, 2)]
    assert [len(chunk) for chunk in plan_chunks(sizes(*[100] * 16), max_numel=25)] == [1] * 16, "no group is cut"


def test_what_rests_off_the_device_goes_alone_and_nothing_is_left_out() -> None:
    shares = [*sizes(*[1] * 8), *sizes(1, 1, place=Place.HOST), *sizes(*[1] * 8)]
    chunks = plan_chunks(shares, max_numel=sys.maxsize)
    assert [index for chunk in chunks for index in chunk] == list(range(len(shares)))
    assert all(len(chunk) == 1 for chunk in chunks if shares[chunk[0]].place is Place.HOST)
    assert all(len({shares[index].place for index in chunk}) == 1 for chunk in chunks)
    assert plan_chunks([], max_numel=1) == []
