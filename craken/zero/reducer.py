"""Sends gradients on their way while backward still runs: which group goes when, and where a backward ends.

    autograd    head.grad  block3.grad ... block0.grad  emb.grad   end of the outermost backward
    group 2     |fill-----|=reduce=|
    group 1               |fill------------|=reduce=|
    group 0                                |fill-------|=reduce=|  what is incomplete goes with zeros

Groups leave in one order that every rank knows, never in order of arrival: a complete group waits for its predecessor.
The order is the last group first, until the first step's end; from then on it is the order in which rank 0 saw groups
become ready. Gradients that come after their group has left stay pending; ranks agree in the step to send them too.

[Note: between two gathers] Where weights are gathered during backward, a rank that waits for a reduction keeps others
waiting for its part of the next gather. So what leaves between two gathers must be the same on all ranks, though on
some a gradient may never come (experts, branches that depend on the data):

    rank 0   gather 5 |all of A came, A leaves            | gather 6
    rank 1   gather 5 |something of A is missing, A closes| A leaves with zeros, gather 6

A group *closes* when the backward of all its uses is over, which the order of modules decides (lifecycle.py). A
complete group leaves before only if the next gather is sure to close it; groups that have no uses of their own (small
weights that are always whole) and those that were once sent too early leave at the end of the backward.

[Note: where a backward ends] Autograd runs a callback at the end of the backward in which it was queued. With reentrant
checkpointing an inner backward ends many times before the outer one does, so the callback is queued from a hook on the
forward's outputs, which fires in the outer backward before anything inside it. A backward that raises never runs its
callback, but drops it: autograd alone refers to it, so that the next backward or forward sees that it is gone. What the
failed one had brought stays, as in `.grad`. `engine.backward` knows where its backward ends and needs no callback.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakMethod, ref

import torch

from craken.comm import broadcast_object, phase
from craken.zero.group import ShardGroup

_MAX_IN_FLIGHT = 2  # groups; more would only hold scratch memory


@dataclass(frozen=True)
class Occasion:
    """What holds for all of one backward.

    reduces: its gradients leave the rank. ends_step: it is in the last micro-batch of a step; replicas then add up
    their sums. grad_factor: asked once a gradient, what that is multiplied by on its way in.
    """

    reduces: bool
    ends_step: bool
    grad_factor: Callable[[], float]


_NO_OCCASION = Occasion(reduces=False, ends_step=False, grad_factor=lambda: 1.0)


class BackwardObserver(Protocol):
    """Who wants to know how a backward proceeds."""

    def closes_next(self, group: ShardGroup) -> bool:
        """Say whether the backward of all uses of `group` is sure to be over at the next gather, on every rank."""

    def gradients_came(self, group: ShardGroup) -> None:
        """Every parameter of `group` has got its gradient in this backward."""

    def backward_ended(self) -> None:
        """The outermost backward is over, or has failed."""


class GradientReducer:
    """Watches gradients arrive and reduces groups in the agreed order."""

    def __init__(self, groups: Sequence[ShardGroup], occasion: Callable[[], Occasion] | None = None) -> None:
        """`occasion`, a method that is held weakly, is asked at the start of each backward.

        What it answers, and who answers, is held until that backward is over.
        """
        self._groups = list(groups)
        self._index = {id(group): index for index, group in enumerate(groups)}
        self.observer: BackwardObserver | None = None
        self._ask = WeakMethod(occasion) if occasion is not None else None
        frees_some = any(group.weights is not None for group in groups)
        self._goes_last = [frees_some and group.weights is None for group in groups]
        self._order = sorted(range(len(groups)), key=lambda index: (self._goes_last[index], -index))
        self._order_is_agreed = False
        self._became_ready: list[int] = []  # in this backward, in order
        self._is_ready = [False] * len(groups)
        self._closed: set[int] = set()  # and incomplete
        self._missing = [0] * len(groups)
        self._seen = [[False] * len(group.params) for group in groups]
        self._next = 0
        self._in_flight: deque[ShardGroup] = deque()
        self._gathering: deque[ShardGroup] = deque()
        self.is_running = False
        self._knows_its_end = False  # the backward under way is `engine.backward`'s
        self._callback: Callable[[], object] | None = None  # gives what autograd calls at its end; None once that died
        self._occasion = _NO_OCCASION
        self.num_backwards = 0

    # --- one backward -------------------------------------------------------------------------------------------------

    def expect_backward(self) -> None:
        """Have `finish_backward` called at the end of the backward that runs now, should gradients come in it."""
        if self.is_expecting:
            return
        self.abandon_backward()
        callback = self.finish_backward
        self._callback = ref(callback)
        torch.autograd.Variable._execution_engine.queue_callback(callback)

    def begin_backward(self) -> bool:
        """Note that the first gradient of a backward came; the backward will be finished when it ends.

        Return False if nobody trains with these groups any more.
        """
        occasion = self._next_occasion()
        if occasion is None:
            return False
        self.expect_backward()
        self._begin(occasion)
        return True

    def _next_occasion(self) -> Occasion | None:
        ask = self._ask() if self._ask is not None else None
        return ask() if ask is not None else None

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Collective when gradients leave in it: one whole backward, whether or not gradients come on this rank."""
        self.abandon_backward()
        self._knows_its_end = True
        self._begin(self._next_occasion() or _NO_OCCASION)
        try:
            yield
        except BaseException:
            self.abandon_backward()
            raise
        self.finish_backward()

    def _begin(self, occasion: Occasion) -> None:
        self.is_running = True
        self._occasion = occasion
        self._next = 0
        self._became_ready = []
        self._is_ready = [False] * len(self._groups)
        self._closed.clear()
        for index, group in enumerate(self._groups):
            self._missing[index] = len(group.params)
            self._seen[index] = [False] * len(group.params)

    def grad_factor(self) -> float:
        """Return what a gradient of the backward that runs is multiplied by on its way in."""
        return self._occasion.grad_factor()

    def gradient_came(self, index: int, slot: int) -> None:
        """Note that group `index` has taken the gradient of its parameter `slot`; may send groups off."""
        if self._seen[index][slot]:
            return
        self._seen[index][slot] = True
        self._missing[index] -= 1
        if self._missing[index] > 0:
            return
        group = self._groups[index]
        if index in self._closed or self.observer is None or self.observer.closes_next(group):
            self._closed.discard(index)
            self._make_ready(index)
            self._send_ready_groups()
        if self.observer is not None:
            self.observer.gradients_came(group)

    def close(self, group: ShardGroup) -> None:
        """Note that the backward of all uses of `group` is over (see [Note: between two gathers])."""
        index = self._index.get(id(group))
        if index is None or not self.is_running:
            return
        if self._missing[index] == 0:
            self._make_ready(index)
            self._send_ready_groups()
        else:
            self._closed.add(index)

    def send_closed(self) -> None:
        """Send what has closed, zeros where nothing came: the next gather begins."""
        if self.is_running and self._closed:
            for index in sorted(self._closed, key=self._order.index):
                self._make_ready(index)
            self._closed.clear()
            self._send_ready_groups()

    def _make_ready(self, index: int) -> None:
        if not self._is_ready[index] and not self._goes_last[index]:
            self._is_ready[index] = True
            self._became_ready.append(index)

    def is_complete(self, group: ShardGroup) -> bool:
        """Say whether no gradient of `group` is missing in the backward that runs; true for groups that have none."""
        index = self._index.get(id(group))
        return index is None or (self.is_running and self._missing[index] == 0)

    @property
    def is_expecting(self) -> bool:
        """A backward is known to run, and its end will be noticed."""
        return self._knows_its_end or (self._callback is not None and self._callback() is not None)

    @property
    def is_collecting(self) -> bool:
        """Gradients of the backward that runs have begun to come."""
        return self.is_running and self.is_expecting

    def _send_ready_groups(self) -> None:
        if not self._occasion.reduces:
            return
        while self._next < len(self._order) and self._is_ready[self._order[self._next]]:
            self._send(self._groups[self._order[self._next]])
            self._next += 1

    def _send(self, group: ShardGroup) -> None:
        while len(self._in_flight) >= _MAX_IN_FLIGHT:
            self._finish_oldest()
        with phase("zero::reduce", group.label):
            group.gradients.start_reduce()
        self._in_flight.append(group)

    def _finish_oldest(self) -> None:
        group = self._in_flight.popleft()
        with phase("zero::wait_reduce", group.label):
            group.gradients.finish_sum()
        if self._occasion.ends_step and group.gradients.awaits_replicas:
            self._start_over_replicas(group)
        elif group.gradients.is_reducing:
            self._gathering.append(group)

    def _start_over_replicas(self, group: ShardGroup) -> None:
        while len(self._gathering) >= _MAX_IN_FLIGHT:
            self._gathering.popleft().gradients.finish_gather()
        with phase("zero::reduce_replicas", group.label):
            group.gradients.start_over_replicas()
        self._gathering.append(group)

    def finish_backward(self) -> None:
        """Collective when this backward reduces: send every group that has not left yet, zeros where nothing came."""
        self._forget_end()
        if self.is_running:
            self.is_running = False
            self.num_backwards += 1
            if self._occasion.reduces:
                for index in self._order[self._next :]:
                    self._send(self._groups[index])
                self._next = len(self._order)
                self._drain()
        self._occasion = _NO_OCCASION
        if self.observer is not None:
            self.observer.backward_ended()

    def abandon_backward(self) -> None:
        """Forget the backward that was running, for it raised, and what the last step took, for a new one begins.

        What a failed backward had reduced stays.
        """
        self.let_go_of_taken()
        was_under_way = self._knows_its_end or self._callback is not None or self.is_running
        self._forget_end()
        if self.is_running:
            self.is_running = False
            self._drain()
        self._occasion = _NO_OCCASION
        if was_under_way and self.observer is not None:
            self.observer.backward_ended()

    def let_go_of_taken(self) -> None:
        """Give back the memory of gradients that the last step took."""
        for group in self._groups:
            if group.gradients.taken is not None:
                group.gradients.drop()

    def _forget_end(self) -> None:
        self._knows_its_end, self._callback = False, None

    def _drain(self) -> None:
        while self._in_flight:
            self._finish_oldest()
        while self._gathering:
            self._gathering.popleft().gradients.finish_gather()

    # --- between backwards --------------------------------------------------------------------------------------------

    def reduce_now(self, indices: Sequence[int]) -> None:
        """Collective: reduce what is pending in these groups; every rank names the same ones."""
        for index in indices:
            self._send(self._groups[index])
            self._goes_last[index] |= self._groups[index].weights is not None  # they were sent too early
        self._order.sort(key=self._goes_last.__getitem__)
        self._drain()

    def sum_over_replicas(self) -> None:
        """Collective where shards are repeated: add up sums that no backward at a boundary has sent to the replicas."""
        for group in self._groups:
            if group.gradients.awaits_replicas:
                self._start_over_replicas(group)
        self._drain()

    def pending_groups(self) -> list[bool]:
        """Say for each group whether this rank holds gradients that were not reduced."""
        return [group.gradients.has_pending for group in self._groups]

    def agree_on_order(self) -> None:
        """Collective, once: take the order in which rank 0 saw groups become ready; those that never did go last."""
        if self._order_is_agreed or not self._groups:
            return
        self._order_is_agreed = True
        became_ready = set(self._became_ready)
        mine = self._became_ready + [index for index in self._order if index not in became_ready]
        self._order = broadcast_object(mine, self._groups[0].wire.everyone)
        self._order.sort(key=self._goes_last.__getitem__)
