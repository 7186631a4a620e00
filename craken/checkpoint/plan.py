"""Decides which rank writes which piece, after checking that the pieces of all ranks make up whole tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from craken.checkpoint.entry import Entry


class _Owned(NamedTuple):
    """An entry as the `position`-th of those that `rank` handed in."""

    rank: int
    position: int
    entry: Entry


def assign_writers(entries_by_rank: Sequence[Sequence[Entry]]) -> list[list[int]]:
    """Return, for each rank, the positions of those of its entries that it writes.

    Every element of every tensor is written once. A range that several ranks hold goes to the one with the fewest
    bytes so far, so replicated tensors are written in parallel too. Pure and deterministic: every rank computes the
    same answer. ValueError when ranks disagree on a shape or dtype, or when ranges overlap or leave a gap.
    """
    holders: dict[tuple[str, str], list[_Owned]] = defaultdict(list)
    for rank, entries in enumerate(entries_by_rank):
        for position, entry in enumerate(entries):
            holders[entry.kind, entry.fqn].append(_Owned(rank, position, entry))
    ranges = [owners for owned in holders.values() for owners in _distinct_ranges(owned)]
    load_bytes = [0] * len(entries_by_rank)
    writes: list[list[int]] = [[] for _ in entries_by_rank]
    for owners in sorted(ranges, key=lambda owners: len(owners) > 1):  # ranges with one holder leave no choice
        owner = min(owners, key=lambda owned: load_bytes[owned.rank])
        load_bytes[owner.rank] += owner.entry.num_bytes
        writes[owner.rank].append(owner.position)
    return [sorted(positions) for positions in writes]


def _distinct_ranges(owned: list[_Owned]) -> list[list[_Owned]]:
    """Group one tensor's owners by range; check that the ranges tile [0, numel)."""
    first = owned[0]
    holders: dict[tuple[int, int], list[_Owned]] = defaultdict(list)
    for other in owned:
        _check_agree(first, other)
        if other.entry.numel:
            holders[other.entry.offset, other.entry.numel].append(other)
    name, end = f"{first.entry.kind} of {first.entry.fqn}", 0
    for (offset, numel), owners in sorted(holders.items()):
        ranks = [owner.rank for owner in owners]
        if len(set(ranks)) < len(ranks):
            raise ValueError(f"{name}: elements [{offset}, {offset + numel}) came twice from one of the ranks {ranks}")
        if offset != end:
            what = "nobody holds" if offset > end else "two different pieces hold"
            low, high = sorted((offset, end))
            raise ValueError(f"{name}: {what} elements [{low}, {high}); the piece at {offset} is from ranks {ranks}")
        end = offset + numel
    total = _numel(first.entry.shape)
    if end != total:
        raise ValueError(f"{name}: nobody holds elements [{end}, {total}) of shape {first.entry.shape}")
    return list(holders.values())


def _check_agree(first: _Owned, other: _Owned) -> None:
    ours, theirs = first.entry[:4], other.entry[:4]
    if ours != theirs:
        raise ValueError(
            f"{first.entry.kind} of {first.entry.fqn}: rank {first.rank} has shape {ours[2]} and dtype {ours[3]}, rank "
            f"{other.rank} has shape {theirs[2]} and dtype {theirs[3]}; expected the same on all ranks"
        )


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
