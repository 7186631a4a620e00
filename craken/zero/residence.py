"""When weights that are kept as shards are whole: asked for by whoever uses them, freed when nobody does.

    hold(group, who)      gathers the group unless it is here, and keeps it so until `who` lets go
    let_go(group, who)    frees it when nobody holds it any more
    pin, unpin            the same for users, who read and write weights at any time

Who holds: forwards that run, the backward that runs, and what must last until the step. The order in which groups were
asked for is remembered: those that come next are gathered ahead, those that come again soon may stay.

[Note: here on every rank] Ranks must gather the same groups in the same order, so whether a gather is due may follow
from the order of modules alone. That is `is_here`: held, gathered ahead or kept. Memory is another matter, for data
differ between ranks: it may go before its time where all gradients have come already (`spare`), and stay longer where
one has not (`lingers`). A group that is not here is gathered even where its memory stayed. Users' pins want the weights
as the shards hold them, also where those of forwards travel with fewer bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from craken.comm import phase
from craken.zero.group import ShardGroup
from craken.zero.memory.room import IdlePages
from craken.zero.plans.order import GatherOrder
from craken.zero.weights import ShardedWeights

FETCHED_AHEAD = 8  # groups; as many as there are buffers for

BACKWARD, UNTIL_STEP = "the backward that runs", "until the step"  # who holds, besides forwards


@dataclass(frozen=True)
class Ceilings:
    """In elements: what may be gathered before it is asked for, what may be whole at one time, kept for reuse.

    What a single unit needs is gathered whatever `live` says. `reuse`: weights needed again before this many elements
    of others stay whole; 0 keeps none.
    """

    ahead: int
    live: int
    reuse: int = 0


class _Stay:
    """One group: who wants it whole, and whether it is here (see the note)."""

    def __init__(self, group: ShardGroup) -> None:
        self.group = group
        self.holders: set[Hashable] = set()
        self.pins: set[Hashable] = set()
        self.is_here = self.is_exact = False

    @property
    def weights(self) -> ShardedWeights:
        assert self.group.weights is not None, f"{self.group.label} is always whole"
        return self.group.weights


class Residence:
    """Which groups are whole, and for whom."""

    def __init__(self, groups: Sequence[ShardGroup], ceilings: Ceilings) -> None:
        self._ceilings = ceilings
        self._stays = [_Stay(group) for group in groups]
        self._index = {id(group): index for index, group in enumerate(groups)}
        self._numels = [group.layout.padded_numel for group in groups]
        self._order = GatherOrder(self._numels)
        self._live = 0  # elements of groups that are here
        self._idle_pages = groups[0].wire.shelf.idle_pages if groups else IdlePages()
        self._rests_in_files = any(stay.weights.is_in_file for stay in self._stays)

    def begin_pass(self, kind: Hashable) -> None:
        """A forward begins that is inside of no other: what was gathered ahead in vain goes, and a new order begins."""
        for index, stay in enumerate(self._stays):
            self._leave(index)
            stay.weights.forget_fetched()
        self._order.begin(kind)

    def hold(self, groups: Iterable[ShardGroup], who: Hashable) -> None:
        """Collective over the axis unless they are here: have `groups` whole until `who` lets go of them."""
        indices = self._indices(groups)
        self._make_room(indices)
        for index in indices:
            if not self._stays[index].holders:
                self._order.note(index)
            self._come(index)
            self._stays[index].holders.add(who)
        for index in indices:
            with phase("zero::gather", self._stays[index].group.label):
                self._stays[index].weights.finish()
        for index in self._order.ahead(min(self._ceilings.ahead, self._ceilings.live - self._live)):
            self._come(index)
        following = self._order.following(FETCHED_AHEAD)
        self._idle_pages.open(not all(self._stays[index].is_here for index in following))
        if self._rests_in_files:  # of which each rank may read ahead as it likes
            for index in following:
                self._stays[index].weights.fetch()

    def let_go(self, groups: Iterable[ShardGroup], who: Hashable, *, lingers: bool = False) -> None:
        """Free those of `groups` that nobody but `who` holds; with `lingers`, their memory stays until `sweep`."""
        for index in self._indices(groups):
            stay = self._stays[index]
            if who in stay.holders:
                stay.holders.discard(who)
                if not self._is_soon_again(index):
                    self._leave(index, lingers=lingers)

    def spare(self, group: ShardGroup) -> None:
        """Give back the memory of a group that only the backward holds, which needs it no more."""
        stay = self._stays[self._index[id(group)]]
        if not stay.pins and stay.holders <= {BACKWARD} and not self._ceilings.reuse:
            stay.weights.free()

    def sweep(self, who: Hashable) -> None:
        """Have `who` let go of everything, and free what lingers."""
        for index, stay in enumerate(self._stays):
            stay.holders.discard(who)
            self._leave(index)

    def renew(self) -> None:
        """Collective: forget every whole copy, for the shards have changed; what is pinned is gathered anew."""
        for stay in self._stays:
            stay.holders.clear()
        for index, stay in enumerate(self._stays):
            self._leave(index)
            if stay.pins:
                self._depart(index)
                stay.weights.free()
                self._come(index, exact=True)
                stay.weights.finish()

    def pin(self, group: ShardGroup, who: Hashable) -> None:
        """Collective over the axis unless a forward or a pin holds it: have a group whole, whatever the model does."""
        (index,) = self._indices([group])
        stay = self._stays[index]
        if not stay.is_exact or (not stay.pins and stay.holders <= {BACKWARD}):  # then some ranks may have spared it
            self._depart(index)
        self._come(index, exact=True)
        stay.pins.add(who)
        stay.weights.finish()

    def unpin(self, group: ShardGroup, who: Hashable) -> None:
        (index,) = self._indices([group])
        self._stays[index].pins.discard(who)
        self._leave(index)

    def is_pinned(self, group: ShardGroup) -> bool:
        return bool(self._stays[self._index[id(group)]].pins)

    def _come(self, index: int, *, exact: bool = False) -> None:
        stay = self._stays[index]
        if not stay.is_here:
            sources = stay.group.wire.weights
            stay.is_here, stay.is_exact = True, exact or sources.quick is sources.exact
            self._live += self._numels[index]
            stay.weights.start(sources, f"{stay.group.label} (weights)", exact=exact)

    def _leave(self, index: int, *, lingers: bool = False) -> None:
        stay = self._stays[index]
        if stay.holders or stay.pins:
            return
        self._depart(index)
        if not lingers:
            stay.weights.free()

    def _depart(self, index: int) -> None:
        if self._stays[index].is_here:
            self._stays[index].is_here = False
            self._live -= self._numels[index]

    def _make_room(self, wanted: Sequence[int]) -> None:
        """Free what nobody holds, what is needed last first, as far as `wanted` would go beyond the ceiling."""
        over = self._live - self._ceilings.live
        over += sum(self._numels[index] for index in wanted if not self._stays[index].is_here)
        if over <= 0:
            return
        idle = [i for i, stay in enumerate(self._stays) if stay.is_here and not stay.holders and i not in wanted]
        for index in sorted(idle, key=self._order.distance, reverse=True):
            if over > 0:
                over -= self._numels[index]
                self._leave(index)

    def _is_soon_again(self, index: int) -> bool:
        if not self._ceilings.reuse or self._stays[index].holders:
            return False
        return self._live <= self._ceilings.live and self._order.distance(index) <= self._ceilings.reuse

    def _indices(self, groups: Iterable[ShardGroup]) -> list[int]:
        return [self._index[id(group)] for group in groups]
