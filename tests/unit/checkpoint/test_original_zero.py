"""Where the original's ranks keep the parts of parameters: pure arithmetic."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from craken.checkpoint.original.contents import Slot
from craken.checkpoint.original.zero import cut_by_parameter, cut_end_to_end


def test_tensors_end_to_end_cross_the_borders_of_parts() -> None:
    assert cut_end_to_end({"a": 3, "b": 6, "c": 1}, [5, 5]) == [
        [Slot("a", 0, 3, 0), Slot("b", 0, 2, 3)],
        [Slot("b", 2, 4, 0), Slot("c", 0, 1, 4)],
    ]


def test_padding_of_the_last_parts_belongs_to_nobody() -> None:
    assert cut_end_to_end({"a": 3}, [2, 2, 2]) == [[Slot("a", 0, 2, 0)], [Slot("a", 2, 1, 0)], []]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_cut_parts_follow_on_each_other_within_their_bounds(numels, lengths) -> None:
    named = {str(i): numel for i, numel in enumerate(numels)}
    found = dict.fromkeys(named, 0)
    for length, slots in zip(lengths, cut_end_to_end(named, lengths), strict=True):
        for slot in slots:
            assert slot.offset == found[slot.name]
            assert 0 <= slot.start <= slot.start + slot.numel <= length
            found[slot.name] += slot.numel
    assert sum(found.values()) == min(sum(numels), sum(lengths))


@given(st.integers(0, 50), st.integers(1, 9))
def test_parts_of_a_parameter_tile_it_and_are_padded_alike(numel, num_ranks) -> None:
    cuts = [cut_by_parameter(numel, rank, num_ranks) for rank in range(num_ranks)]
    end = 0
    for offset, held, padded in cuts:
        assert (offset, padded) == (end, -(-numel // num_ranks))
        end += held
    assert end == numel
