"""Remembers the order in which groups were needed, and says which come next and how soon one comes again. Pure.

A pass is a forward and what follows it until the next one begins. As long as a pass asks for groups in the order in
which the last pass of its kind (training, evaluation) did, what comes next is known; after the first group that differs
nothing is foretold until the pass is over, and the new order is the one to remember.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence


class GatherOrder:
    """The order of the last pass of each kind, and how far the present one follows it."""

    def __init__(self, numels: Sequence[int]) -> None:
        """numels: elements of each group."""
        self._numels = list(numels)
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

    def ahead(self, room: int) -> Iterator[int]:
        """Yield the groups that will be needed next, as many as fit into `room` elements."""
        for index in self._to_come():
            room -= self._numels[index]
            if room < 0:
                return
            yield index

    def following(self, count: int) -> Sequence[int]:
        """Return the next `count` groups that will be needed."""
        return self._to_come()[:count]

    def distance(self, index: int) -> float:
        """Return the elements that will be needed before group `index` is needed again; infinity if it is not known."""
        passed = 0
        for other in self._to_come():
            if other == index:
                return passed
            passed += self._numels[other]
        return math.inf

    def _to_come(self) -> Sequence[int]:
        return self._remembered.get(self._kind, [])[len(self._present) :] if self._follows else []
