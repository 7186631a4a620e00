"""Plans an update: which groups one call of the optimizer takes. Pure.

An update in several calls overlaps: weights of the groups before travel, and states of those after come to hand, while
the optimizer runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from craken.zero.memory.placement import Place

_NUM_CHUNKS = 8  # on the device, an update in more pieces overlaps no more and costs a call of the optimizer each


class Share(NamedTuple):
    """What a rank updates of one group: elements, and where they rest (on the device, or one memory with it)."""

    numel: int
    place: Place


def plan_chunks(shares: Sequence[Share], *, max_numel: int) -> list[range]:
    """Return runs of groups that are updated together.

    At most 1/8 of the groups, which all rest in one place; groups that rest off the device alone. max_numel: what a run
    of several should not exceed, in elements.
    """
    most = max(1, -(-len(shares) // _NUM_CHUNKS))
    chunks: list[range] = []
    start = numel = 0
    for index, share in enumerate(shares):
        fits = (
            index - start < most
            and share.place is Place.DEVICE is shares[start].place
            and numel + share.numel <= max_numel
        )
        if index > start and not fits:
            chunks.append(range(start, index))
            start, numel = index, 0
        numel += share.numel
    return [*chunks, range(start, len(shares))] if shares else []
