"""When weights that are kept as shards are whole: asked for by whoever uses them, freed when nobody does.

    hold(group, who)      gathers the group unless it is whole, and keeps it so until `who` lets go
    let_go(group, who)    frees it when nobody holds it any more

    pin, unpin            the same for users, who read and write weights at any time

Who holds: the forward and the backward of a unit's passage. The order in which groups were asked for is remembered, and
those that come next are gathered ahead, as far as `max_ahead` elements go. Every rank must ask in the same order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from craken.comm import phase
from craken.zero.group import ShardGroup
from craken.zero.order import GatherOrder
from craken.zero.weights import ShardedWeights


class Residence:
    """Which groups are whole, and for whom."""

    def __init__(self, groups: Sequence[ShardGroup], *, max_ahead: int) -> None:
        """max_ahead: elements that may be gathered before anybody asks for them."""
        self._groups = list(groups)
        self._index = {id(group): index for index, group in enumerate(groups)}
        self._holders: list[set[Hashable]] = [set() for _ in groups]
        self._pins: list[set[Hashable]] = [set() for _ in groups]
        self._order = GatherOrder([group.layout.padded_numel for group in groups], max_ahead=max_ahead)

    def begin_pass(self, kind: Hashable) -> None:
        """A forward begins that is inside of no other: what was gathered ahead in vain goes, and a new order begins."""
        for index in range(len(self._groups)):
            self._free_if_unused(index)
        self._order.begin(kind)

    def hold(self, groups: Iterable[ShardGroup], who: Hashable) -> None:
        """Collective over the axis unless they are whole: have `groups` whole until `who` lets go of them."""
        indices = self._indices(groups)
        for index in indices:
            if not self._holders[index]:
                self._order.note(index)
                self._start(index)
            self._holders[index].add(who)
        for index in indices:
            with phase("zero::gather", self._groups[index].label):
                self._weights(index).finish()
        for index in self._order.ahead():
            self._start(index)

    def let_go(self, groups: Iterable[ShardGroup], who: Hashable) -> None:
        """Free those of `groups` that nobody but `who` holds."""
        for index in self._indices(groups):
            if who in self._holders[index]:
                self._holders[index].discard(who)
                self._free_if_unused(index)

    def release(self, group: ShardGroup) -> None:
        """Free a group whoever holds it, unless it is pinned."""
        for index in self._indices([group]):
            self._holders[index].clear()
            self._free_if_unused(index)

    def release_all(self) -> None:
        """Free every group that is not pinned."""
        for group in self._groups:
            self.release(group)

    def renew(self) -> None:
        """Collective: forget every whole copy, for the shards have changed; what is pinned is gathered anew."""
        self.release_all()
        for index, pins in enumerate(self._pins):
            if pins:
                self._weights(index).free()
                self._start(index, exact=True)
                self._weights(index).finish()

    def pin(self, group: ShardGroup, who: Hashable) -> None:
        """Collective over the axis unless it is whole: have a group whole, whatever the model does, until unpinned."""
        (index,) = self._indices([group])
        self._pins[index].add(who)
        self._start(index, exact=True)
        self._weights(index).finish()

    def unpin(self, group: ShardGroup, who: Hashable) -> None:
        (index,) = self._indices([group])
        self._pins[index].discard(who)
        self._free_if_unused(index)

    def is_pinned(self, group: ShardGroup) -> bool:
        return bool(self._pins[self._index[id(group)]])

    def _free_if_unused(self, index: int) -> None:
        if not self._holders[index] and not self._pins[index]:
            self._weights(index).free()

    def _indices(self, groups: Iterable[ShardGroup]) -> list[int]:
        return [self._index[id(group)] for group in groups]

    def _start(self, index: int, *, exact: bool = False) -> None:
        group = self._groups[index]
        self._weights(index).start(group.wire.weights, f"{group.label} (weights)", exact=exact)

    def _weights(self, index: int) -> ShardedWeights:
        weights = self._groups[index].weights
        assert weights is not None, f"{self._groups[index].label} is always whole"
        return weights
