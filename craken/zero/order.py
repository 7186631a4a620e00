"""Remembers the order in which groups were gathered, and says which to gather ahead. Pure.

A pass is a forward and what follows it until the next one begins. As long as a pass asks for groups in the order in
which the last pass of its kind (training, evaluation) did, what comes next is known; after the first group that differs
nothing is foretold until the pass is over, and the new order is the one to remember.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence


class GatherOrder:
    """The order of the last pass of each kind, and how far the present one follows it."""

    def __init__(self, numels: Sequence[int], *, max_ahead: int) -> None:
        """numels: elements of each group. max_ahead: elements that may be gathered before they are asked for."""
        self._numels, self._max_ahead = list(numels), max_ahead
        self._remembered: dict[Hashable, list[int]] = {}
        self._kind: Hashable = None
        self._present: list[int] = []
        self._follows = True

    def begin(self, kind: Hashable) -> None:
        """Begin a pass of this kind; what the pass before it asked for is remembered."""
        if self._present:
            self._remembered[self._kind] = self._present
        self._kind, self._present, self._follows = kind, [], True

    def note(self, index: int) -> None:
        """Note that group `index` is needed now."""
        at, known = len(self._present), self._remembered.get(self._kind, [])
        self._follows = self._follows and at < len(known) and known[at] == index
        self._present.append(index)

    def ahead(self) -> Iterator[int]:
        """Yield the groups that will be needed next, as many as `max_ahead` elements hold."""
        if not self._follows:
            return
        room = self._max_ahead
        for index in self._remembered.get(self._kind, [])[len(self._present) :]:
            room -= self._numels[index]
            if room < 0:
                return
            yield index
