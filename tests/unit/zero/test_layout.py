"""Layouts: every element of every parameter lies in exactly one shard, whatever the sizes and ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craken.zero.plans.layout import ALIGN, Cut, lay_out

SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=30)
RANKS = st.integers(1, 9)


@given(SIZES, RANKS, st.sampled_from(Cut))
def test_fragments_of_all_ranks_tile_every_parameter(numels, world_size, cut):
    layout = lay_out(numels, world_size, cut)
    pieces = {slot: [] for slot in range(len(numels))}
    for rank in range(world_size):
        for piece in layout.fragments(rank):
            flat = rank * layout.shard_numel + piece.shard_offset
            assert flat == layout.slots[piece.slot].offset + piece.param_offset
            assert piece.shard_offset + piece.numel <= layout.shard_numel
            pieces[piece.slot].append((piece.param_offset, piece.numel))
    for slot, numel in enumerate(numels):
        at = 0
        for offset, length in sorted(pieces[slot]):
            assert offset == at
            at += length
        assert at == numel


@given(SIZES, RANKS, st.sampled_from(Cut))
def test_slots_and_gaps_tile_the_flat_buffer(numels, world_size, cut):
    layout = lay_out(numels, world_size, cut)
    ranges = sorted((slot.offset, slot.numel) for slot in [*layout.slots, *layout.gaps] if slot.numel)
    at = 0
    for offset, numel in ranges:
        assert offset == at
        at += numel
    assert at == layout.padded_numel


@given(SIZES, RANKS)
def test_packed_padding_is_under_one_alignment_a_rank(numels, world_size):
    layout = lay_out(numels, world_size, Cut.PACKED)
    assert layout.padded_numel - sum(numels) < (ALIGN + 1) * world_size
    assert layout.shard_numel % ALIGN == 0


@given(SIZES, RANKS)
def test_whole_never_cuts_a_parameter_and_no_rank_is_more_than_one_parameter_over_the_mean(numels, world_size):
    layout = lay_out(numels, world_size, Cut.WHOLE)
    for rank in range(world_size):
        for piece in layout.fragments(rank):
            assert piece.numel == numels[piece.slot]
    assert layout.shard_numel <= sum(numels) / world_size + max(numels) + ALIGN


def test_two_ranks_share_a_parameter_that_lies_across_the_border():
    layout = lay_out([40, 40], 2, Cut.PACKED)
    assert layout.shard_numel == 64
    first, second = layout.fragments(0), layout.fragments(1)
    assert [(p.slot, p.param_offset, p.numel) for p in first] == [(0, 0, 40), (1, 0, 24)]
    assert [(p.slot, p.param_offset, p.numel) for p in second] == [(1, 24, 16)]


@pytest.mark.parametrize("cut", Cut)
def test_one_rank_holds_everything(cut):
    layout = lay_out([3, 5], 1, cut)
    assert [piece.numel for piece in layout.fragments(0)] == [3, 5]
