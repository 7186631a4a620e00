"""Runs an agent on each host through ssh, and ends the whole job when one host ends badly.

No pty and no remote kill command: each agent's stdin is a pipe held open here. Orders go down it; when this launcher
dies, by whatever signal, or the network does, sshd closes the pipe, the agent reads its end and stops its ranks.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import BinaryIO, NamedTuple

from craken.launch.failure import Failure, first_cause, report, shell_code
from craken.launch.orders import split_records
from craken.launch.supervise import Order
from craken.log import logger

_ABORT_S = 15.0  # an agent's own limits (1.5 s to settle, 5 s grace) and the network's delay
_SSH_FAILED = 255
_DRAIN_S = 1.0


class _Ended(NamedTuple):
    host: str
    code: int


class HostDriver:
    """Drives the agents of a job; `run` once."""

    def __init__(self, commands: Mapping[str, list[str]], *, grace_s: float, min_hosts: int | None = None) -> None:
        self._commands = commands
        self._grace_s = grace_s
        self._min_hosts = len(commands) if min_hosts is None else min_hosts  # fewer left: the job is lost
        self._events: queue.SimpleQueue[_Ended | Order] = queue.SimpleQueue()
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._codes: dict[str, int] = {}
        self._failures: list[Failure] = []
        self._deadline_s: float | None = None

    def run(self) -> int:
        """Start all agents, return the job's exit code when all have ended; what failed first is logged once."""
        with self._signals_as_orders():
            try:
                for host, command in self._commands.items():
                    self._start(host, command)
                while len(self._codes) < len(self._agents):
                    self._handle_next_event()
            finally:
                for agent in self._agents.values():
                    agent.kill()
        return self._verdict()

    def _start(self, host: str, command: list[str]) -> None:
        try:
            agent = subprocess.Popen(
                command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, bufsize=0
            )
        except OSError as error:
            raise ValueError(f"cannot run {command[0]!r} ({error.strerror}); install it") from error
        self._agents[host] = agent
        threading.Thread(target=self._follow, args=(host, agent), daemon=True).start()

    def _follow(self, host: str, agent: subprocess.Popen[bytes]) -> None:
        reader = threading.Thread(target=self._pass_through, args=(host, agent.stderr), daemon=True)
        reader.start()
        code = shell_code(agent.wait())
        reader.join(_DRAIN_S)  # on this host a process that ranks left behind may hold the pipe open
        self._events.put(_Ended(host, code))

    def _pass_through(self, host: str, source: BinaryIO) -> None:
        rest = b""
        while chunk := source.read(1 << 16):
            shown, failures, rest = split_records(rest + chunk)
            sys.stderr.buffer.write(shown)
            sys.stderr.buffer.flush()
            now = time.monotonic()  # hosts' clocks do not compare
            self._failures += [replace(failure, host=host, time_s=now) for failure in failures]
        sys.stderr.buffer.write(rest)

    def _handle_next_event(self) -> None:
        wait_s = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        try:
            event = self._events.get(timeout=wait_s)
        except queue.Empty:
            logger.error(f"giving up on {', '.join(self._running())}: no end after the time allowed")
            self._deadline_s = None
            for host in self._running():
                self._agents[host].kill()
            return
        if isinstance(event, Order):
            logger.info(f"passing {event.name} on to hosts; ranks have {self._grace_s:g} s; Ctrl-C again stops them")
            self._send(event)
            self._limit(self._grace_s + _ABORT_S)
            return
        self._codes[event.host] = event.code
        if event.code == 0:
            return
        if self._num_good() >= self._min_hosts:
            logger.warning(f"{event.host} is lost (exit code {event.code}); the job goes on with {self._running()}")
            return
        self._send(Order.ABORT)
        self._limit(_ABORT_S)

    def _running(self) -> list[str]:
        return [host for host in self._agents if host not in self._codes]

    def _num_good(self) -> int:
        """Count the hosts that run or have ended well."""
        return len(self._agents) - sum(code != 0 for code in self._codes.values())

    def _limit(self, seconds: float) -> None:
        deadline_s = time.monotonic() + seconds
        self._deadline_s = deadline_s if self._deadline_s is None else min(self._deadline_s, deadline_s)

    def _send(self, order: Order) -> None:
        for host in self._running():
            pipe = self._agents[host].stdin
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.write(order.name.encode() + b"\n")

    def _verdict(self) -> int:
        bad = {host: code for host, code in self._codes.items() if code != 0}
        if self._num_good() >= self._min_hosts:
            return 0
        for host, code in bad.items():
            if code == _SSH_FAILED and not any(failure.host == host for failure in self._failures):
                logger.error(f"{host}: ssh failed, its reason is above; `ssh {host} true` must work without questions")
        if self._failures:
            logger.error(report(self._failures))
            return first_cause(self._failures).code
        return next(iter(bad.values()), 0)

    @contextlib.contextmanager
    def _signals_as_orders(self) -> Iterator[None]:
        def handle(signum: int, frame: FrameType | None) -> None:
            self._events.put(Order.INTERRUPT if signum == signal.SIGINT else Order.TERMINATE)

        previous = {}
        if threading.current_thread() is threading.main_thread():
            previous = {
                signum: signal.signal(signum, handle)
                for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
                if signum is signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN
            }
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)
