"""Groups: one kind each, in order, within the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craken.zero.plans.grouping import Budget, ParamFacts, plan_groups
from craken.zero.plans.layout import Cut, lay_out


def facts(*numels, dtype="float32", cut=Cut.PACKED):
    return [ParamFacts(f"p{i}", numel, dtype, 4 if dtype == "float32" else 2, cut) for i, numel in enumerate(numels)]


def test_neighbours_share_a_group_until_the_bytes_are_spent():
    assert plan_groups(facts(100, 100, 100, 100), world_size=2, budget=Budget(800, 10**9)) == [[0, 1], [2, 3]]


def test_a_bucket_size_in_elements_is_a_ceiling_too():
    assert plan_groups(facts(100, 100, 100), world_size=2, budget=Budget(10**9, 150)) == [[0], [1], [2]]


def test_a_parameter_over_the_budget_is_alone():
    assert plan_groups(facts(10, 10_000, 10), world_size=2, budget=Budget(400, 10**9)) == [[0], [1], [2]]


def test_dtypes_and_cuts_never_mix_but_keep_their_own_open_group():
    mixed = [*facts(10), *facts(10, dtype="bfloat16"), *facts(10), *facts(10, cut=Cut.WHOLE)]
    assert plan_groups(mixed, world_size=2, budget=Budget(10**6, 10**9)) == [[0, 2], [1], [3]]


def test_whole_groups_grow_past_the_budget_rather_than_waste_shards():
    groups = plan_groups(facts(*[1000] * 8, cut=Cut.WHOLE), world_size=4, budget=Budget(4000, 10**9))
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert lay_out([1000] * 4, 4, Cut.WHOLE).padded_numel < 1.05 * 4000


@given(st.lists(st.integers(1, 3000), max_size=40), st.integers(1, 8), st.integers(1, 20_000))
def test_every_parameter_is_in_one_group_in_order(numels, world_size, num_bytes):
    groups = plan_groups(facts(*numels), world_size=world_size, budget=Budget(num_bytes, 10**9))
    assert [index for group in groups for index in group] == list(range(len(numels)))


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        Budget(0, 1)
