"""Where each parameter lies in a shard group's flat buffer: pure arithmetic.

A flat buffer has world_size shards of `shard_numel` elements each; rank r keeps [r*S, (r+1)*S).

    PACKED   |---- a ----|-- b --|------ c ------|pad|      parameters end to end; a shard border may cut one
             |  rank 0   |   rank 1   |   rank 2     |
    WHOLE    |---- a ----|pad|-- b --|-- d --|---- c ----|  each parameter entire in one shard, shards balanced
             |    rank 0     |     rank 1    |  rank 2   |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cached_property
from typing import NamedTuple

ALIGN = 32  # elements: shards begin on 64 bytes in every dtype


class Cut(Enum):
    """What may be cut when parameters are dealt to ranks."""

    PACKED = auto()  # anywhere: elementwise optimizers
    WHOLE = auto()  # only between parameters: optimizers that need matrices


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the flat buffer: elements [offset, offset + numel)."""

    offset: int
    numel: int


@dataclass(frozen=True)
class Fragment:
    """The part of parameter `slot` in one rank's shard.

    `numel` elements: from `param_offset` in the flattened parameter, and from `shard_offset` in the shard.
    """

    slot: int
    param_offset: int
    shard_offset: int
    numel: int


class Cuts(NamedTuple):
    """The sizes of a flat buffer's pieces, parameters and gaps, in order; and which piece each parameter is."""

    numels: list[int]
    piece_of_slot: list[int]


@dataclass(frozen=True)
class GroupLayout:
    """A flat buffer of `world_size` shards of `shard_numel` elements, and a slot for every parameter, in order."""

    slots: tuple[Slot, ...]
    shard_numel: int
    world_size: int

    @property
    def padded_numel(self) -> int:
        return self.shard_numel * self.world_size

    @property
    def numel(self) -> int:
        return sum(slot.numel for slot in self.slots)

    def fragments(self, rank: int) -> list[Fragment]:
        """Return what lies in `rank`'s shard, in slot order; parameters without a part there are left out."""
        start, stop = rank * self.shard_numel, (rank + 1) * self.shard_numel
        found = []
        for index, slot in enumerate(self.slots):
            first, last = max(start, slot.offset), min(stop, slot.offset + slot.numel)
            if first < last:
                found.append(Fragment(index, first - slot.offset, first - start, last - first))
        return found

    @cached_property
    def gaps(self) -> list[Slot]:
        """The ranges that hold no parameter (padding)."""
        gaps, at = [], 0
        for slot in sorted(self.slots, key=lambda slot: slot.offset):
            if slot.offset > at:
                gaps.append(Slot(at, slot.offset - at))
            at = max(at, slot.offset + slot.numel)
        if at < self.padded_numel:
            gaps.append(Slot(at, self.padded_numel - at))
        return gaps

    @cached_property
    def cuts(self) -> Cuts:
        """Where to cut a flat buffer so that each parameter and each gap is a piece."""
        runs = sorted([*enumerate(self.slots), *((-1, gap) for gap in self.gaps)], key=_place_in_buffer)
        piece_of = {index: at for at, (index, _) in enumerate(runs)}
        return Cuts([slot.numel for _, slot in runs], [piece_of[index] for index in range(len(self.slots))])


def _place_in_buffer(run: tuple[int, Slot]) -> tuple[int, int]:
    _, slot = run
    return slot.offset, slot.numel  # nothing lies before what begins at the same place


def lay_out(numels: Sequence[int], world_size: int, cut: Cut) -> GroupLayout:
    """Lay parameters of the given sizes into one flat buffer."""
    return _pack(numels, world_size) if cut is Cut.PACKED else _deal_whole(numels, world_size)


def _pack(numels: Sequence[int], world_size: int) -> GroupLayout:
    slots, at = [], 0
    for numel in numels:
        slots.append(Slot(at, numel))
        at += numel
    return GroupLayout(tuple(slots), _round_up(-(-at // world_size)), world_size)


def _deal_whole(numels: Sequence[int], world_size: int) -> GroupLayout:
    """Largest first to the least loaded rank: within 4/3 of the best balance (Graham 1969)."""
    loads, place = [0] * world_size, {}
    for index in sorted(range(len(numels)), key=lambda index: -numels[index]):
        rank = loads.index(min(loads))
        place[index] = (rank, loads[rank])
        loads[rank] += numels[index]
    shard_numel = _round_up(max(loads))
    slots = tuple(Slot(place[i][0] * shard_numel + place[i][1], numel) for i, numel in enumerate(numels))
    return GroupLayout(slots, shard_numel, world_size)


def _round_up(numel: int) -> int:
    return max(1, -(-numel // ALIGN)) * ALIGN
