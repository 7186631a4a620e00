"""Requests cut for direct I/O: everything is covered once, and what is called direct is aligned."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from craken.disk.pieces import Piece, cut
from craken.disk.settings import ALIGNMENT_BYTES

PAGE = ALIGNMENT_BYTES


@given(
    offset=st.integers(0, 5 * PAGE),
    num_bytes=st.integers(0, 9 * PAGE),
    address=st.integers(0, 3 * PAGE),
    piece_pages=st.integers(1, 4),
)
def test_pieces_cover_a_request_once_and_direct_ones_are_aligned(
    offset: int, num_bytes: int, address: int, piece_pages: int
) -> None:
    pieces = cut(offset, num_bytes, address, piece_pages * PAGE)
    assert sum(piece.num_bytes for piece in pieces) == num_bytes
    ends = sorted((piece.offset, piece.offset + piece.num_bytes) for piece in pieces)
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(ends))
    assert not ends or (ends[0][0], ends[-1][1]) == (offset, offset + num_bytes)
    for piece in pieces:
        assert 0 < piece.num_bytes <= piece_pages * PAGE
        if piece.is_direct:
            assert piece.offset % PAGE == piece.num_bytes % PAGE == (address + piece.offset - offset) % PAGE == 0


def test_no_two_pieces_share_a_page() -> None:
    pieces = cut(100, 4 * PAGE, 100, 2 * PAGE)
    assert pieces == [
        Piece(PAGE, 2 * PAGE, True),
        Piece(3 * PAGE, PAGE, True),
        Piece(100, PAGE - 100, False),
        Piece(4 * PAGE, 100, False),
    ]


def test_memory_that_is_aligned_otherwise_than_the_file_goes_through_a_block() -> None:
    assert cut(0, 2 * PAGE, 64, PAGE) == [Piece(0, PAGE, False), Piece(PAGE, PAGE, False)]


def test_a_request_within_one_page_is_one_piece() -> None:
    assert cut(10, 20, 10, PAGE) == [Piece(10, 20, False)]


def test_nothing_is_no_piece() -> None:
    assert cut(10, 0, 10, PAGE) == []


def test_without_alignment_every_piece_is_direct() -> None:
    assert cut(3, 10, 1, 8, alignment=1) == [Piece(3, 8, True), Piece(11, 2, True)]
