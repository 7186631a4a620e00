"""Runs of forwards and what their backwards still need: pure bookkeeping of groups and their uses.

A *passage* is one run of a unit's forward. Its *uses* are the unit's own groups, and each group that it read besides.
A use begins its backward when a gradient reaches the passage's outputs, and ends it when the gradients of the passage's
inputs are known. A use that no other unit's passage began inside of is *innermost*: autograd works backwards through
the order of the forward, so the next unit whose backward begins proves that the use's is over.

A group *closes* when none of its uses is in backward and no use that was seen in forward is still to come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from craken.zero.group import ShardGroup
from craken.zero.plans.units import Unit


class Use:
    """Groups that a stretch of a forward reads, and its backward again."""

    def __init__(self, groups: Sequence[ShardGroup]) -> None:
        self.groups = list(groups)
        self.is_innermost = True


class Passage:
    """One run of a unit's forward, and the backward of it."""

    def __init__(self, unit: Unit, groups: Sequence[ShardGroup]) -> None:
        self.unit = unit
        self.uses = [Use(groups)] if groups else []
        self.takes_gradients = False

    @property
    def groups(self) -> list[ShardGroup]:
        return [group for use in self.uses for group in use.groups]

    def read(self, group: ShardGroup) -> bool:
        """Note that the passage reads a group; False if it did so before."""
        if any(group in use.groups for use in self.uses):
            return False
        self.uses.append(Use([group]))
        return True

    def enclose(self) -> None:
        """Note that another unit's passage begins inside."""
        for use in self.uses:
            use.is_innermost = False


class Uses:
    """Uses of groups: those to come in backward, and those whose backward has begun."""

    def __init__(self) -> None:
        self._to_come: Counter[int] = Counter()  # by id of a group
        self._begun: list[Use] = []

    def await_backward(self, passage: Passage) -> None:
        """Note that the uses of a finished forward will come again in backward."""
        self._to_come.update(id(group) for group in passage.groups)

    def forget_awaited(self) -> None:
        """Expect nothing of forwards so far: their graphs may be gone."""
        self._to_come.clear()

    def begin(self, passage: Passage) -> None:
        """Note that the backward of a passage begins."""
        self._begun += [use for use in passage.uses if use not in self._begun]

    def end(self, uses: Sequence[Use]) -> list[ShardGroup]:
        """Note that the backward of `uses` is over; return the groups that close."""
        ended = [use for use in uses if use in self._begun]
        self._begun = [use for use in self._begun if use not in ended]
        closed = []
        for use in ended:
            for group in use.groups:
                self._to_come[id(group)] -= 1
                if self._to_come[id(group)] <= 0:
                    del self._to_come[id(group)]
                    if not self._in_backward(group):
                        closed.append(group)
        return closed

    def end_innermost(self, beside: Passage) -> list[ShardGroup]:
        """Note that the backward of `beside` begins, so that innermost uses are over; return the groups that close."""
        return self.end([use for use in self._begun if use.is_innermost and use not in beside.uses])

    def end_all(self) -> None:
        """Note that the whole backward is over."""
        self._begun.clear()

    def closes_next(self, group: ShardGroup) -> bool:
        """Say whether the next passage whose backward begins is sure to close `group`."""
        begun = self._in_backward(group)
        return all(use.is_innermost for use in begun) and 0 < len(begun) >= self._to_come[id(group)]

    def _in_backward(self, group: ShardGroup) -> list[Use]:
        return [use for use in self._begun if group in use.groups]
