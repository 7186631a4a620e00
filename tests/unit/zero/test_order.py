"""What is gathered ahead: what followed the last time, within the budget, while the present pass follows it."""

from __future__ import annotations

import math

from craken.zero.plans.order import GatherOrder


def run_pass(order: GatherOrder, kind: str, indices: list[int], room: int = 9) -> list[list[int]]:
    order.begin(kind)
    foretold = []
    for index in indices:
        order.note(index)
        foretold.append(list(order.ahead(room)))
    return foretold


def test_nothing_is_foretold_in_the_first_pass() -> None:
    assert run_pass(GatherOrder([1, 1, 1]), "train", [0, 1, 2]) == [[], [], []]


def test_the_second_pass_foretells_the_first_within_the_budget() -> None:
    order = GatherOrder([1, 2, 3])
    run_pass(order, "train", [0, 1, 2, 2, 0])
    assert run_pass(order, "train", [0, 1, 2, 2, 0], room=3) == [[1], [2], [2], [0], []]


def test_a_pass_that_goes_another_way_is_left_alone_and_remembered() -> None:
    order = GatherOrder([1, 1, 1])
    run_pass(order, "train", [0, 1, 2])
    assert run_pass(order, "train", [0, 2, 1], room=1) == [[1], [], []]
    assert run_pass(order, "train", [0, 2, 1], room=1) == [[2], [1], []]


def test_kinds_of_passes_are_remembered_apart() -> None:
    order = GatherOrder([1, 1])
    run_pass(order, "train", [0, 1, 1, 0])
    run_pass(order, "evaluation", [0, 1])
    assert run_pass(order, "train", [0, 1, 1, 0], room=1) == [[1], [1], [0], []]
    assert run_pass(order, "evaluation", [0, 1], room=1) == [[1], []]


def test_how_soon_a_group_comes_again_is_counted_in_the_elements_between() -> None:
    order = GatherOrder([1, 2, 4])
    run_pass(order, "train", [0, 1, 2, 2, 0])
    order.begin("train")
    for index in (0, 1, 2):
        order.note(index)
    assert [order.distance(index) for index in (2, 0, 1)] == [0, 4, math.inf]
