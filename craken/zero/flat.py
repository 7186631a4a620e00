"""Parts of a group's flat buffers: the rank's own slice, one parameter's place, the gaps between parameters."""

from __future__ import annotations

from torch import Tensor

from craken.zero.layout import GroupLayout, Slot


def own_part(flat: Tensor, layout: GroupLayout, rank: int) -> Tensor:
    """Return `rank`'s slice [shard_numel] of a flat buffer [padded_numel]."""
    return flat.narrow(0, rank * layout.shard_numel, layout.shard_numel)


def slot_view(flat: Tensor, slot: Slot, shape: tuple[int, ...]) -> Tensor:
    """Return one parameter's place in a flat buffer [padded_numel], in the parameter's shape."""
    return flat.narrow(0, slot.offset, slot.numel).view(shape)


def zero_gaps(flat: Tensor, layout: GroupLayout) -> None:
    """Set what belongs to no parameter to zero: it is summed and takes part in norms."""
    for gap in layout.gaps():
        flat.narrow(0, gap.offset, gap.numel).zero_()
