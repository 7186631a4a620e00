"""Finds ranks that wait for each other for good, and has all of them raise, naming who waits for what.

    rank 0   wait for weights of block 1 ....................... released | raise
    rank 1   wait for weights of block 2 ....................... released | raise
    watchdog          | PATIENCE_S later: every rank's tells the store what its rank waits for, again and again
    rank 0's          |                   all ranks wait, and no call has all of its ranks: the verdict
    every rank's      |                   sends and takes the messages that others wait for, of no use to anybody

A rank that computes tells nothing, so that others go on waiting for it; so they do when all wait for the same. gloo's
waits can neither be interrupted nor tried for a while (one that times out closes the connection for good), hence the
messages in place of the missing ones. Between two looks the thread sleeps: a wait costs it nothing.

[Note: the backend's own collectives] On NCCL a wait only orders streams, and the host goes on, perhaps into a
synchronisation that never returns. There a rank waits for the oldest collective that it has started and that is not
done. What is kept of it to tell so is the future of its result, which holds no tensor: works hold their outputs, and
the host runs ahead of the device by as many as it likes. The verdict aborts the groups, so that kernels and whoever
synchronises with them return, and is raised by the next call; what was computed in between is never used.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from craken.comm.deadlock import Waiting, explain, is_deadlock
from craken.comm.mesh import MeshAxis
from craken.log import logger

PATIENCE_S = 30.0
_NUM_REMEMBERED = 128  # collectives of the backend's own
_VERDICT, _TOLD = "verdict", "told"  # keys in the store, beside one a rank


class RanksDisagreeError(RuntimeError):
    """The ranks wait for each other; raised on all of them."""


class Call(NamedTuple):
    """A collective made of messages, as every rank that takes part knows it."""

    what: str
    tag: int
    axis: MeshAxis


class Message(NamedTuple):
    """A message to or from a peer on its call's axis."""

    tensor: Tensor
    peer: int
    is_sent: bool


class Exchange:
    """A call's messages, under way."""

    def __init__(
        self, call: Call, peers: Sequence[int], *, sends: Sequence[Tensor], receives: Sequence[Tensor]
    ) -> None:
        """Start a message to and one from each of the peers, ranks of the axis, in their order."""
        group, tag = call.axis.group, call.tag
        assert group is not None, "an axis of several ranks has a group"
        self.call, self._peers, self._tensors = call, peers, (*receives, *sends)
        # the group's own calls: isend and irecv check what holds here by construction, at 7 us a message
        self.works: list[Any] = [group.recv([t], peer, tag) for t, peer in zip(receives, peers, strict=True)]
        self.works += [group.send([t], peer, tag) for t, peer in zip(sends, peers, strict=True)]

    def message(self, at: int) -> Message:
        """Return the message that `works[at]` carries."""
        is_sent = at >= len(self._peers)
        return Message(self._tensors[at], self._peers[at % len(self._peers)], is_sent)

    def wait(self) -> None:
        """Return when all messages have gone or come; RanksDisagreeError if one never will."""
        _watchdog.wait(self)


class Started:
    """A call of the backend's own collective, under way. [Note: the backend's own collectives]"""

    def __init__(self, what: str, axis: MeshAxis, collective: Callable[..., Any], *tensors: Tensor) -> None:
        """Collective over `axis`: call `collective(*tensors)`, one of torch.distributed's; raises as `wait` does."""
        self._ends = _watchdog.follow(what, axis)  # the first call over a group may itself wait
        try:
            self._work = _watchdog.run(collective, *tensors, group=axis.group, async_op=True)
        except BaseException:
            self._ends.append(_always)
            raise
        if axis.backend == "nccl":  # on others the host waits until it is done
            self._ends.append(self._work.get_future_result().done)

    def wait(self) -> None:
        """Complete the collective, on CUDA in the order of streams; RanksDisagreeError once it is known to be lost."""
        _watchdog.run(self._work.wait)
        self._ends.append(_always)


def _always() -> bool:
    return True


def watched(what: str, axis: MeshAxis, collective: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Collective over `axis`: call one of torch.distributed's that returns when it is done; raises as `wait` does."""
    ends = _watchdog.follow(what, axis)
    try:
        _watchdog.run(collective, *args, **options, group=axis.group)
    finally:
        ends.append(_always)


class _Call(NamedTuple):
    """A collective of the backend's own, the how manieth over its group (`at`) and of the process (`number`).

    ends: first what tells of its end, once something can.
    """

    what: str
    axis: MeshAxis
    at: int
    since: float
    number: int
    ends: list[Callable[[], object]]

    def is_done(self) -> bool:
        return bool(self.ends) and bool(self.ends[0]())

    def told(self, beat: int) -> Waiting:
        past = [call.what for call in _watchdog.past() if call.axis.group is self.axis.group and call.at <= self.at]
        return _told(self.what, self.at, self.axis, self.number, beat)._replace(at=self.at, past=past)


class _Wait(NamedTuple):
    """What this rank waits for, since when, and the how manieth wait it is."""

    exchange: Exchange
    at: int
    since: float
    number: int

    def told(self, beat: int) -> Waiting:
        call, message = self.exchange.call, self.exchange.message(self.at)
        return _told(call.what, call.tag, call.axis, self.number, beat)._replace(
            peer=call.axis.global_rank(message.peer),
            tag=call.tag,
            num_bytes=message.tensor.nbytes,
            is_sent=message.is_sent,
        )


def _told(what: str, at: int, axis: MeshAxis, number: int, beat: int) -> Waiting:
    """Return what tells of the `at`-th call over an axis."""
    assert axis.group is not None
    group, members = axis.group.group_name, [axis.global_rank(rank) for rank in range(axis.size)]
    return Waiting(what, f"{group}/{at} {what}", members, dist.get_rank(), number, beat, group=group)


class _Watchdog:
    """Looks after the waits of this process; its thread lives as long as the process group."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._waiting: _Wait | None = None
        self._calls: deque[_Call] = deque()  # the backend's own, as started; those that are done go from the front
        self._past: deque[_Call] = deque(maxlen=_NUM_REMEMBERED)
        self._num_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
        self._number = self._beat = 0
        self._has_told = False
        self._last: list[Waiting] = []  # what all ranks told when rank 0 looked last
        self._verdict: str | None = None
        self._answers: list[Any] = []  # messages of no use; dropping one would cancel it

    def wait(self, exchange: Exchange) -> None:
        if self._thread is None:
            self._start()
        if self._verdict is not None:
            raise RanksDisagreeError(self._verdict)
        try:
            for at, work in enumerate(exchange.works):
                self._number, since = self._number + 1, time.monotonic()
                self._waiting = _Wait(exchange, at, since, self._number)
                work.wait()
                if self._verdict is not None or time.monotonic() - since >= PATIENCE_S:
                    self._raise_verdict(None)
        except RanksDisagreeError:
            raise
        except RuntimeError as error:
            self._raise_verdict(error)  # others may have raised it first, and gone
            raise
        finally:
            self._waiting = None

    def run(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what `call` does; once its group has been aborted, raise the verdict whatever it returns or raises."""
        result = None
        try:
            if self._verdict is None:
                result = call(*args, **options)
        except Exception as error:
            self._raise_verdict(error)
            raise
        if self._verdict is not None:
            self._raise_verdict(None)
        return result

    def follow(self, what: str, axis: MeshAxis) -> list[Callable[[], object]]:
        """Keep a collective of the backend's own in mind until it is done; what tells so is to go into the list."""
        if self._thread is None:
            self._start()
        assert axis.group is not None, "an axis of several ranks has a group"
        if axis.group not in self._num_calls:
            with self._lock:  # the thread goes through the groups
                self._num_calls[axis.group] = 0
        at = self._num_calls[axis.group] = self._num_calls[axis.group] + 1
        self._number += 1
        while self._calls and self._calls[0].is_done():
            self._calls.popleft()
        call = _Call(what, axis, at, time.monotonic(), self._number, [])
        self._calls.append(call)
        self._past.append(call)
        return call.ends

    def past(self) -> Sequence[_Call]:
        """Return the last calls of the backend's own, oldest first."""
        return tuple(self._past)

    def _raise_verdict(self, cause: Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the store may be gone with its host
            self._take_verdict()
        if self._verdict is not None:
            self._await_others()
            raise RanksDisagreeError(self._verdict) from cause

    def _start(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(self._stop,), name="craken-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Forget this process group; the thread ends when it looks next."""
        self._stop.set()
        self._thread = None
        self._reset()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(PATIENCE_S / 4) and self._verdict is None:
            try:
                self._look()
            except (RuntimeError, ValueError):  # the store or the process group is gone: the job ends
                if not stop.is_set():
                    self._thread = None
                return

    def _look(self) -> None:
        waiting = self._waiting or next((call for call in tuple(self._calls) if not call.is_done()), None)
        if waiting is None or time.monotonic() - waiting.since < PATIENCE_S:
            if self._has_told:
                self._has_told = False
                _store().set(str(dist.get_rank()), "null")
            return
        self._has_told, self._beat = True, self._beat + 1
        _store().set(str(dist.get_rank()), json.dumps(waiting.told(self._beat)._asdict()))
        if dist.get_rank() == 0:
            self._judge()
        self._take_verdict()

    def _judge(self) -> None:
        """Give the verdict once every rank has told the same twice, the second time after the first was read."""
        keys = [str(rank) for rank in range(dist.get_world_size())]
        told: list[Any] = [json.loads(text) for text in _store().multi_get(keys)] if _store().check(keys) else []
        last, self._last = self._last, []
        if len(told) < len(keys) or None in told:
            return
        now = self._last = [_read(wait) for wait in told]
        stayed = len(last) == len(now) and all(
            new.number == old.number and new.beat > old.beat for new, old in zip(now, last, strict=True)
        )
        if stayed and is_deadlock(now):
            _store().set(_VERDICT, json.dumps([wait._asdict() for wait in now]))

    def _take_verdict(self) -> None:
        """Learn of a verdict, and let go whoever waits for this rank."""
        with self._lock:
            if self._verdict is None and _store().check([_VERDICT]):
                waits = [_read(wait) for wait in json.loads(_store().get(_VERDICT))]
                self._answers += [_answer(wait) for wait in waits if wait.peer == dist.get_rank()]
                self._verdict = explain(waits)
                _store().add(_TOLD, 1)
                if self._num_calls:  # what is computed until the next call of ours raises it is wrong
                    logger.error(self._verdict)
                for group in list(self._num_calls):
                    # each in a thread: the abort of one communicator may wait for kernels that another's would end
                    threading.Thread(target=_abort, args=(group,), daemon=True).start()

    def _await_others(self) -> None:
        """Stay until every rank has learnt of the verdict: connections close when a process ends."""
        deadline = time.monotonic() + PATIENCE_S
        with contextlib.suppress(RuntimeError):
            while _store().add(_TOLD, 0) < dist.get_world_size() and time.monotonic() < deadline:
                time.sleep(0.05)


_watchdog = _Watchdog()


def stop_watching() -> None:
    """Let the watchdog go; called when the process group is taken down."""
    _watchdog.stop()


def _read(told: dict[str, Any]) -> Waiting:
    return Waiting(**told)


def _store() -> Any:
    return torch._C._distributed_c10d.PrefixStore("craken/waits", dist.distributed_c10d._get_default_store())


def _abort(group: dist.ProcessGroup) -> None:
    """End the group's collectives, where its backend can: NCCL's kernels return, and so does who waits for them."""
    with contextlib.suppress(RuntimeError):  # it may be gone already
        group.abort()


def _answer(wait: Waiting) -> Any:
    """Take, or send, the message that another rank waits for."""
    group = torch._C._distributed_c10d._resolve_process_group(wait.group)  # type: ignore[arg-type]
    buffer = torch.zeros(wait.num_bytes if wait.is_sent else 1, dtype=torch.uint8)
    exchange = group.recv if wait.is_sent else group.send
    return buffer, exchange([buffer], dist.get_group_rank(group, wait.rank), wait.tag)
