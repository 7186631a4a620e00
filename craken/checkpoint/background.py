"""Saves in the background: training stands still while this rank's pieces are copied, not while they are written.

    main thread     | announce | copy |  steps ......................... | next save or `wait`: raises what went wrong
    writer thread                     | write, fsync, tell |
    rank 0's                          | write, fsync | read all, publish, tell |
                                                                              `--> every rank's writer takes it

What ranks agree on before anything is written goes by collectives on the main thread, as in saver.py. How it went they
tell each other through the job's store: training's own collectives run meanwhile, and a thread's among them would come
in another order on every rank. Each writer leaves a letter about its file; rank 0's reads all, gives the folder its
name or deletes it, and leaves the verdict, which is the same everywhere.

The copy is of what this rank writes (replicated tensors are shared out before), in host memory that is kept from save
to save, pinned where there is CUDA: the price of a save in the background is that memory, once. The writer thread is
no daemon: the interpreter waits for it, and ends with 1 where it failed and nobody has been told.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from craken.checkpoint import folder as folders
from craken.checkpoint import unheard
from craken.checkpoint.agreement import Failure, combined, failure_of, run_on_all
from craken.checkpoint.entry import Piece, bytes_of
from craken.checkpoint.index import WrittenFile
from craken.checkpoint.place import Place
from craken.checkpoint.remote import StagedUrl
from craken.checkpoint.saver import Agreed, Staged, Target, agree, publish, stage, write
from craken.comm import Mailbox, MeshAxis, all_reduce_sum
from craken.disk import pages, round_up
from craken.log import log_dist, warn_once

PATIENCE_S = 300.0  # from the end of a rank's own file to the others' letters, with _PATIENCE_RATIO of its own time
_PATIENCE_RATIO = 20
_FAREWELL_S = 10.0  # how long rank 0, which may serve the store, stays for others to read the verdict
_ALIGNMENT_BYTES = 64
_VERDICT = "the verdict"

_Outcome = WrittenFile | Failure


class Stall(NamedTuple):
    """How long training stood still for a save on this rank: in all, for the save before, and for the copy alone."""

    seconds: float
    waited_s: float
    copy_s: float
    num_bytes: int


class BackgroundSaver:
    """Saves of one engine, one under way at a time: IDLE -> WRITING -> IDLE, by `save` and `wait`."""

    def __init__(self) -> None:
        self.stall: Stall | None = None  # of the last save
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._under_way: Future[None] | None = None

    @property
    def is_writing(self) -> bool:
        """A save is under way."""
        return self._under_way is not None and not self._under_way.done()

    def save(
        self,
        target: Target,
        pieces: Iterable[Piece],
        *,
        axis: MeshAxis,
        rank_state: dict[str, Any],
        shared_state: dict[str, Any],
        since_s: float,
    ) -> Place:
        """Collective over `axis`: begin a save as `saver.save` does, and return once everything is copied.

        Waits for the save before, and raises its failure if it had one: nothing is begun then. Errors before the
        writing are raised here, all later ones at the next `save` or `wait`, on all ranks. `pieces` are free on return.
        since_s: the `time.perf_counter()` at which training stopped for it.
        """
        start_s = time.perf_counter()
        if self.is_writing:
            warn_once("a checkpoint is to be saved while the one before is still being written: training waits for it")
        self.wait()
        waited_s = time.perf_counter() - start_s
        with record_function(f"craken::checkpoint::copy ({target.tag})"):
            agreed = agree(target, pieces, axis=axis, rank_state=rank_state, shared_state=shared_state)
            num_bytes, copy_s = self._begin(agreed, axis)
        self.stall = Stall(time.perf_counter() - since_s, waited_s, copy_s, num_bytes)
        return target.folder / target.tag

    def wait(self) -> None:
        """Return once the save under way, if any, is on the disk; call it on all ranks.

        Raises the save's failure, once: OSError when a file system refused, else RuntimeError, the same on all ranks;
        RuntimeError alone on ranks that the others have left.
        """
        if self._under_way is None:
            return
        wait_for([self._under_way])  # an interrupt leaves it under way: its copy may not be written over
        done, self._under_way = self._under_way, None
        error = done.exception()
        if error is not None:
            unheard.drop(error)
            raise error

    def look(self, axis: MeshAxis) -> None:
        """Collective over `axis` between a `save` and its end: `wait` once every rank's writer has come to an end.

        So a failure is raised by the same call on all ranks, however unevenly they hear of it.
        """
        if self._under_way is None:
            return
        is_done = self._under_way.done()
        has_failed = is_done and self._under_way.exception() is not None
        notes = torch.tensor([not is_done, has_failed], dtype=torch.float64, device="cpu")
        num_writing, num_failed = all_reduce_sum(notes, axis, label="ranks that write").tolist()
        if num_writing:
            return
        self.wait()
        if num_failed:
            raise RuntimeError(f"{int(num_failed)} of {axis.size} ranks lost the others while they saved a checkpoint")

    def _begin(self, agreed: Agreed, axis: MeshAxis) -> tuple[int, float]:
        """Collective: make the folder, copy what this rank writes and start its thread; returns bytes and seconds."""
        target = agreed.target
        with contextlib.ExitStack() as unless_begun:

            def stage_and_copy() -> tuple[tuple[folders.Staging | None, list[Tensor], float], Place | StagedUrl]:
                staging, path = stage(target, axis.rank, unless_begun)
                return (staging, *self._copied(agreed)), path

            (staging, tensors, copy_s), paths = run_on_all(stage_and_copy, axis, doing=target.doing)
            without_pieces = agreed._replace(plan=agreed.plan._replace(pieces=[]))
            staged = Staged(without_pieces, staging, paths[0])
            self._under_way = _start(_Writing(staged, tensors, Mailbox(staged.path.name, axis), axis))
            unless_begun.pop_all()
        return sum(tensor.numel() for tensor in tensors), copy_s

    def _copied(self, agreed: Agreed) -> tuple[list[Tensor], float]:
        """Copy what this rank writes; returns host tensors, uint8 [num_bytes of an entry], and the copy's seconds."""
        sources = [bytes_of(agreed.plan.pieces[i].tensor) for i in agreed.to_write]
        starts, end = [], 0
        for source in sources:
            starts.append(end)
            end += round_up(source.numel(), _ALIGNMENT_BYTES)
        if self._memory.numel() < end:
            self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")  # gone before the larger one comes
            self._memory = _host_memory(end)
        start_s = time.perf_counter()
        copies = [self._memory[start : start + source.numel()] for start, source in zip(starts, sources, strict=True)]
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        for device in {source.device for source in sources if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies, time.perf_counter() - start_s


class _Writing(NamedTuple):
    """One save under way: what its thread works on."""

    staged: Staged
    tensors: list[Tensor]
    mailbox: Mailbox
    axis: MeshAxis


def _start(writing: _Writing) -> Future[None]:
    result: Future[None] = Future()
    threading.Thread(target=_run, args=(writing, result), name="craken-checkpoint-writer", daemon=False).start()
    return result


def _run(writing: _Writing, result: Future[None]) -> None:
    """Write, agree, and set the result."""
    target, start_s = writing.staged.agreed.target, time.perf_counter()
    try:
        with record_function(f"craken::checkpoint::write ({target.tag})"):
            verdict = _write_and_agree(writing)
    except Exception as error:  # noqa: BLE001 - raised at the next call; of this rank alone: it has lost the others
        _fail(result, RuntimeError(f"{target.doing}: rank {writing.axis.rank} has lost the others: {error}"))
        return
    if any(verdict):
        _fail(result, combined(verdict, target.doing))
    else:
        path, num_bytes = target.folder / target.tag, sum(tensor.numel() for tensor in writing.tensors)
        log_dist(f"saved {path}: {num_bytes:,} bytes of rank 0 in {time.perf_counter() - start_s:.2f} s")
        result.set_result(None)
    if writing.axis.rank == 0:
        _take_leave(writing)


def _fail(result: Future[None], error: Exception) -> None:
    unheard.hold(error)
    result.set_exception(error)


def _write_and_agree(writing: _Writing) -> list[Failure | None]:
    """Return for each rank what went wrong on it."""
    staged, tensors, mailbox, axis = writing
    outcome: _Outcome
    start_s = time.monotonic()
    try:
        outcome = write(staged, tensors, axis.rank)
    except Exception as error:  # noqa: BLE001 - all ranks raise it
        outcome = failure_of(error)
    patience_s = PATIENCE_S + _PATIENCE_RATIO * (time.monotonic() - start_s)
    if axis.rank == 0:
        verdict = _conclude(writing, outcome, patience_s)
        mailbox.post(_VERDICT, verdict)
        return verdict
    mailbox.post(_letter_of(axis.rank), outcome)
    theirs: list[Failure | None] = mailbox.read([_VERDICT], patience_s=patience_s)[0]
    mailbox.post(_thanks_of(axis.rank), None)
    return theirs


def _conclude(writing: _Writing, outcome: _Outcome, patience_s: float) -> list[Failure | None]:
    """Rank 0: put the folder in place once all ranks have written; say for each rank what went wrong on it."""
    staged, _, mailbox, axis = writing
    assert staged.staging is not None
    try:
        others = mailbox.read([_letter_of(rank) for rank in range(1, axis.size)], patience_s=patience_s)
        outcomes: list[_Outcome] = [outcome, *others]
        files = [outcome for outcome in outcomes if isinstance(outcome, WrittenFile)]
        if len(files) < axis.size:
            return [outcome if isinstance(outcome, Failure) else None for outcome in outcomes]
        publish(staged, files)
        return [None] * axis.size
    except Exception as error:  # noqa: BLE001 - all ranks raise it
        return [failure_of(error), *[None] * (axis.size - 1)]
    finally:
        folders.discard(staged.staging)


def _take_leave(writing: _Writing) -> None:
    """Rank 0: stay until the others have read the verdict, then take the letters out of the store."""
    mailbox, others = writing.mailbox, range(1, writing.axis.size)
    thanks = [_thanks_of(rank) for rank in others]
    try:
        mailbox.read(thanks, patience_s=_FAREWELL_S)
    except (TimeoutError, RuntimeError):  # a rank that is gone reads no more
        return
    mailbox.clear([_VERDICT, *thanks, *(_letter_of(rank) for rank in others)])


def _letter_of(rank: int) -> str:
    return f"rank {rank}"


def _thanks_of(rank: int) -> str:
    return f"thanks of rank {rank}"


def _host_memory(num_bytes: int) -> Tensor:
    try:
        return pages(num_bytes, pinned=True)
    except RuntimeError as error:
        warn_once(f"copies for checkpoints go to memory that is not pinned, at a lower rate: {error}")
        return pages(num_bytes)
