"""Which blocks hold a range."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.index import PieceRecord, TensorRecord
from craken.checkpoint.read_plan import plan_reads


@settings(max_examples=60)
@given(
    numel=st.integers(1, 90),
    cuts=st.sets(st.integers(1, 89), max_size=4),
    ends=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    block_elements=st.integers(1, 20),
)
def test_reads_planned_for_a_range_fetch_just_its_bytes(
    numel: int, cuts: set[int], ends: tuple[int, int], block_elements: int
) -> None:
    low, high = sorted(min(end, numel) for end in ends)
    data = bytes(range(1, numel + 1)) * 2
    stored, bounds, pieces = b"junk", [0, *sorted(cut for cut in cuts if cut < numel), numel], []
    for begin, end in itertools.pairwise(bounds):
        num_blocks = -(-(end - begin) * 2 // (block_elements * 2))
        pieces.append(
            PieceRecord("f", len(stored), len(stored) + 2 * (end - begin), begin, end - begin, ("",) * num_blocks)
        )
        stored += data[2 * begin : 2 * end] + b"gap"
    record = TensorRecord("p", "w", (numel,), "F16", tuple(pieces))
    out = bytearray(2 * (high - low))
    for read in plan_reads(record, low, high - low, itemsize=2, block_bytes=2 * block_elements):
        assert read.num_bytes <= 2 * block_elements
        block = stored[read.start : read.start + read.num_bytes]
        out[read.into : read.into + read.take] = block[read.skip : read.skip + read.take]
    assert bytes(out) == data[2 * low : 2 * high]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_elements_that_no_piece_holds_are_an_error_not_zeros(missing: int) -> None:
    pieces = [PieceRecord("f", 8 * i, 8 * i + 8, 4 * i, 4, ("",)) for i in range(3) if i != missing]
    record = TensorRecord("param", "w", (12,), "F16", tuple(pieces))
    with pytest.raises(CheckpointDamaged, match=r"no file holds elements \[.*\) of param of w"):
        plan_reads(record, 0, 12, itemsize=2, block_bytes=64)
