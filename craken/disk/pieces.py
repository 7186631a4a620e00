"""Cuts a request into pieces that direct I/O takes as they are and pieces that go through an aligned block."""

from __future__ import annotations

from typing import NamedTuple

from craken.disk.settings import ALIGNMENT_BYTES, round_down, round_up


class Piece(NamedTuple):
    """One part of a request: a range of the file, and whether its memory can be handed to the disk as it is."""

    offset: int
    num_bytes: int
    is_direct: bool


def cut(
    offset: int, num_bytes: int, address: int, piece_bytes: int, *, alignment: int = ALIGNMENT_BYTES
) -> list[Piece]:
    """Cut `num_bytes` at `offset` of a file, in memory at `address`, into pieces of at most `piece_bytes`.

    Pages that the request covers in part stand alone, at either end, so that no two pieces of a request share a page:

        |....====|========|========|==......|      . other data   = the request
          ragged    whole: direct if the   ragged
                  memory is aligned as well

    An alignment of 1 (a file open for buffered I/O) makes every piece direct.
    """
    end = offset + num_bytes
    low = min(round_up(offset, alignment), end)
    high = max(round_down(end, alignment), low)
    is_aligned = (address + low - offset) % alignment == 0
    whole = [Piece(at, min(piece_bytes, high - at), is_aligned) for at in range(low, high, piece_bytes)]
    ragged = [Piece(begin, stop - begin, False) for begin, stop in ((offset, low), (high, end)) if stop > begin]
    return [*whole, *ragged]
