"""Starts a host's ranks and watches them until the last has ended.

Why an own loop, and torch's elastic agent for `--elastic_training` only. Measured with the agent (torch 2.13): it exits
with 1 whatever the rank's code was, takes 32 s when a surviving rank ignores SIGTERM, names a victim as the root cause
when the first rank was killed, costs 1-2 s of `import torch` before a rank starts, and polls every 0.1 s. Here:

    event                          what happens                                              time
    a rank fails on its own        the others get SIGTERM, then SIGKILL                      now, + 5 s
    a rank fails as a victim       wait for the rank that caused it to say why, then as above  + 1.5 s, + 5 s
    a rank raises but hangs        as if it had ended                                        + 3 s
    SIGINT, SIGTERM, SIGHUP        passed on once, so that ranks can save; then SIGKILL      now, + grace
    a second Ctrl-C                SIGKILL                                                   now

Each rank leads a session of its own, so a terminal's Ctrl-C reaches the launcher alone and each rank gets the signal
exactly once, from here; being outside the terminal's session they may still read and write it (debugger, progress bar).
One thread a rank blocks in `wait`, so an end is seen at once and in order; all decisions are taken in one loop.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from craken.launch.failure import Failure, first_cause, read_failure, shell_code
from craken.launch.guard import ERROR_FOLDER
from craken.launch.streams import RankLogs
from craken.log import logger

_SETTLE_S = 1.5  # how long a victim's cause may take to show
_FAILURE_GRACE_S = 5.0  # from SIGTERM to SIGKILL once the job is lost
_STUCK_S = 3.0  # how long a rank may take to end after its last exception
_LOOK_S = 1.0  # how often that is looked at
_SECOND_PRESS_S = 0.5  # two interrupts closer than this count as one


@dataclass(frozen=True)
class RankCommand:
    """What to run for one rank; `environment` is complete, `cores` None leaves the rank unbound."""

    rank: int
    command: list[str]
    environment: Mapping[str, str]
    cores: Sequence[int] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a host's ranks ended; `failures` holds those that ended otherwise than well or as they were told."""

    code: int
    failures: tuple[Failure, ...] = ()
    finished_ranks: tuple[int, ...] = ()


class Order(Enum):
    """What the launcher can be told while ranks run."""

    INTERRUPT = auto()  # Ctrl-C: SIGINT to ranks, time to save
    TERMINATE = auto()  # SIGTERM to ranks, time to save
    ABORT = auto()  # a rank elsewhere is lost: SIGTERM, and little time
    KILL = auto()
    SUSPEND = auto()  # Ctrl-Z


class _Exit(NamedTuple):
    rank: int
    returncode: int
    time_s: float


class _Phase(Enum):
    """RUNNING -> SETTLING (a victim failed) -> STOPPING (ranks were told to end) -> KILLED; phases may be skipped."""

    RUNNING = auto()
    SETTLING = auto()
    STOPPING = auto()
    KILLED = auto()


_ORDER_OF_SIGNAL = {
    signal.SIGINT: Order.INTERRUPT,
    signal.SIGTERM: Order.TERMINATE,
    signal.SIGHUP: Order.TERMINATE,
    signal.SIGTSTP: Order.SUSPEND,
}


class Supervisor:
    """Runs the ranks of one host; `run` once, `give` orders from any thread or signal handler meanwhile."""

    def __init__(
        self,
        commands: Sequence[RankCommand],
        *,
        grace_s: float = 30.0,
        log_folder: Path | None = None,
        is_agent: bool = False,
        is_carrier: bool = False,
    ) -> None:
        self._commands = commands
        self._grace_s = grace_s
        self._logs = RankLogs(log_folder)
        self._is_agent = is_agent  # stdin carries orders, so no rank may read it
        self._interrupt = signal.SIGTERM if is_carrier else signal.SIGINT  # srun and pdsh take SIGINT as a question
        self._events: queue.SimpleQueue[_Exit | Order] = queue.SimpleQueue()
        self._alive: dict[int, subprocess.Popen[bytes]] = {}
        self._pids: dict[int, int] = {}
        self._phase = _Phase.RUNNING
        self._deadline_s: float | None = None
        self._stopped_at_s = float("inf")
        self._stop_codes: set[int] = set()  # exit codes that mean "ended as told"
        self._codes: dict[int, int] = {}  # rank -> exit code, in order of exit
        self._failures: list[Failure] = []

    def give(self, order: Order) -> None:
        """Hand an order to the loop; safe in signal handlers and other threads."""
        self._events.put(order)

    def run(self) -> Outcome:
        """Start all ranks, return when all have ended. Raises ValueError when a program cannot be started at all."""
        with tempfile.TemporaryDirectory(prefix="craken_launch_") as folder, self._signals_as_orders():
            try:
                self._start(folder)
                while self._alive:
                    self._handle_next_event(Path(folder))
            finally:
                self._kill()
            self._logs.finish()
        return self._outcome()

    def _start(self, folder: str) -> None:
        for command in self._commands:
            process = self._popen(command, folder)
            self._alive[command.rank] = process
            self._pids[command.rank] = process.pid
            self._logs.follow(command.rank, process)
            threading.Thread(target=self._await, args=(command.rank, process), daemon=True).start()

    def _popen(self, command: RankCommand, folder: str) -> subprocess.Popen[bytes]:
        is_reader = command is self._commands[0] and not self._is_agent
        with _bound_to(command.cores):
            try:
                return subprocess.Popen(
                    command.command,
                    env={**command.environment, ERROR_FOLDER: folder},
                    stdin=None if is_reader else subprocess.DEVNULL,
                    stdout=self._logs.target,
                    stderr=self._logs.target,
                    start_new_session=True,
                )
            except OSError as error:
                raise ValueError(f"cannot start {command.command[0]!r}: {error.strerror}; check its path") from error

    def _await(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        returncode = process.wait()
        self._events.put(_Exit(rank, returncode, time.monotonic()))

    def _handle_next_event(self, folder: Path) -> None:
        wait_s = _LOOK_S if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        try:
            event = self._events.get(timeout=wait_s)
        except queue.Empty:
            if self._deadline_s is not None:
                self._pass_deadline()
            elif self._phase is _Phase.RUNNING and self._is_one_stuck(folder):
                self._stop(signal.SIGTERM, _FAILURE_GRACE_S)
            return
        if isinstance(event, _Exit):
            self._note_exit(event, folder)
        else:
            self._obey(event)

    def _is_one_stuck(self, folder: Path) -> bool:
        """Claim that a rank has filed its last exception and yet does not end, held by a thread of its own."""
        filed = [folder / f"{rank}.json" for rank in self._alive]
        return any(file.exists() and time.time() - file.stat().st_mtime > _STUCK_S for file in filed)

    def _pass_deadline(self) -> None:
        if self._phase is _Phase.SETTLING:
            self._stop(signal.SIGTERM, _FAILURE_GRACE_S)
        else:
            self._kill()

    def _note_exit(self, event: _Exit, folder: Path) -> None:
        del self._alive[event.rank]
        self._codes[event.rank] = shell_code(event.returncode)
        if event.returncode == 0:
            return
        failure = read_failure(folder, event.rank, self._pids[event.rank], event.returncode, exit_time_s=event.time_s)
        if failure.time_s > self._stopped_at_s and self._is_as_told(failure):
            return
        self._failures.append(failure)
        self._react(failure)

    def _is_as_told(self, failure: Failure) -> bool:
        """Claim that this end follows from the signal we sent, or from peers that got it."""
        return failure.code in self._stop_codes or failure.is_victim or failure.kind == "KeyboardInterrupt"

    def _react(self, failure: Failure) -> None:
        if self._phase in (_Phase.RUNNING, _Phase.SETTLING):
            if not failure.is_victim:
                self._stop(signal.SIGTERM, _FAILURE_GRACE_S)
            elif self._phase is _Phase.RUNNING:
                self._phase = _Phase.SETTLING
                self._deadline_s = time.monotonic() + _SETTLE_S
        elif self._phase is _Phase.STOPPING and self._deadline_s is not None:
            self._deadline_s = min(self._deadline_s, time.monotonic() + _FAILURE_GRACE_S)

    def _obey(self, order: Order) -> None:
        if order is Order.SUSPEND:
            self._suspend()
        elif order is Order.KILL:
            self._kill()
        elif self._phase in (_Phase.RUNNING, _Phase.SETTLING):
            signum = self._interrupt if order is Order.INTERRUPT else signal.SIGTERM
            grace_s = _FAILURE_GRACE_S if order is Order.ABORT else self._grace_s
            if order is not Order.ABORT and not self._is_agent:
                logger.info(f"passing {signum.name} on to ranks; they have {grace_s:g} s. Ctrl-C again stops them now")
            self._stop(signum, grace_s)
        elif order is Order.ABORT and self._deadline_s is not None:
            self._deadline_s = min(self._deadline_s, time.monotonic() + _FAILURE_GRACE_S)
        elif order is Order.INTERRUPT and time.monotonic() - self._stopped_at_s > _SECOND_PRESS_S:
            self._kill()

    def _stop(self, signum: signal.Signals, grace_s: float) -> None:
        self._phase = _Phase.STOPPING
        self._stopped_at_s = time.monotonic()
        self._deadline_s = self._stopped_at_s + grace_s
        self._stop_codes |= {128 + signum, 128 + signal.SIGKILL}
        for process in self._alive.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signum)

    def _kill(self) -> None:
        """SIGKILL what still runs, with the processes it started."""
        self._phase = _Phase.KILLED
        self._deadline_s = None
        self._stopped_at_s = min(self._stopped_at_s, time.monotonic())
        self._stop_codes.add(128 + signal.SIGKILL)
        for process in self._alive.values():
            _signal_group(process.pid, signal.SIGKILL)

    def _suspend(self) -> None:
        for process in self._alive.values():
            _signal_group(process.pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in self._alive.values():
            _signal_group(process.pid, signal.SIGCONT)

    def _outcome(self) -> Outcome:
        finished = tuple(rank for rank, code in self._codes.items() if code == 0)
        if self._failures:
            for pid in self._pids.values():
                _signal_group(pid, signal.SIGTERM)  # what a dead rank left behind, data loader workers for one
            return Outcome(first_cause(self._failures).code, tuple(self._failures), finished)
        return Outcome(next((code for code in self._codes.values() if code), 0), (), finished)

    @contextlib.contextmanager
    def _signals_as_orders(self) -> Iterator[None]:
        """Turn signals into orders; only Python's main thread may, and what `nohup` ignores stays ignored."""

        def handle(signum: int, frame: FrameType | None) -> None:
            self.give(_ORDER_OF_SIGNAL[signal.Signals(signum)])

        previous = {}
        if threading.current_thread() is threading.main_thread():
            for signum in _ORDER_OF_SIGNAL:
                if signum is signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
                    previous[signum] = signal.signal(signum, handle)
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _signal_group(pid: int, signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


@contextlib.contextmanager
def _bound_to(cores: Sequence[int] | None) -> Iterator[None]:
    """Bind this thread, and so the process it starts, to `cores` for the time of the block."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
