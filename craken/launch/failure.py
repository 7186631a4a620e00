"""Finds the failure that took a job down among those it caused, and words the report."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What a rank says when its peer is gone: the peer is the cause, and this rank its victim.
_PEER_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "remote process exited or there was a network error",
    "socket closed",
    "broken pipe",
    "failed to recv, got 0 bytes",
    "peer closed",
    "connectfullmesh failed",
    "did the remote server shutdown or crash",
    "application timeout caused pair closure",
)


@dataclass(frozen=True)
class Failure:
    """One rank's end other than by exit code 0.

    `code` is the exit code as a shell sees it (128 + number for a signal); `time_s` is on the host's monotonic clock;
    `traceback` is empty when the rank left none (killed, `os._exit`, not Python).
    """

    rank: int
    pid: int
    code: int
    time_s: float
    kind: str = ""
    message: str = ""
    traceback: str = ""
    host: str = ""

    @property
    def is_victim(self) -> bool:
        """Claim that this rank failed because a peer had gone."""
        return any(words in self.message.lower() for words in _PEER_LOST)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        return cls(**json.loads(text))


def shell_code(returncode: int) -> int:
    """Turn a `Popen.returncode` into a shell's exit code: 128 + number for death by signal."""
    return 128 - returncode if returncode < 0 else returncode


def read_filed(folder: Path) -> list[Failure]:
    """Read all exceptions filed in `folder` since the last restart, in order of time; each ends a rank with code 1."""
    records = [(int(path.stem), json.loads(path.read_text())) for path in folder.glob("*.json")]
    last = max((record["attempt"] for _, record in records), default=0)
    failures = [_joined(rank, 1, record) for rank, record in records if record["attempt"] == last]
    return sorted(failures, key=lambda failure: failure.time_s)


def read_failure(folder: Path, rank: int, pid: int, returncode: int, *, exit_time_s: float) -> Failure:
    """Join what the launcher saw (`returncode`, time of exit) with what the rank filed in `folder` before it ended."""
    code = shell_code(returncode)
    try:
        filed = json.loads((folder / f"{rank}.json").read_text())
    except (OSError, ValueError):
        return Failure(rank, pid, code, exit_time_s, kind=signal_name(code))
    if returncode < 0 and filed["type"] != "KeyboardInterrupt":
        code = 1  # stopped by the launcher on its way out; the exception came first
    return _joined(rank, code, filed)


def first_cause(failures: Sequence[Failure]) -> Failure:
    """Return the earliest failure that is no consequence of another rank's end, or the earliest when all are."""
    return min(failures, key=lambda failure: (failure.is_victim, failure.time_s))


def report(failures: Sequence[Failure], finished_ranks: Sequence[int] = ()) -> str:
    """Word the cause with its traceback, once, and one line for each rank that failed after it."""
    cause = first_cause(failures)
    lines = [f"{_where(cause)} failed first, {_how(cause)}."]
    if cause.traceback:
        lines.append(cause.traceback.rstrip())
    elif cause.code < 128:
        lines.append("It left no Python traceback: look for its last lines above.")
    if cause.is_victim and finished_ranks:
        done = ", ".join(str(rank) for rank in sorted(finished_ranks))
        lines.append(f"It lost a peer that was done: rank {done} had exited with code 0 before.")
    elif cause.is_victim:
        lines.append("It lost its connection to a peer; no rank watched here failed before it, so look at other hosts.")
    for failure in sorted(failures, key=lambda failure: failure.rank):
        if failure is not cause:
            first_line = failure.message.splitlines()[0] if failure.message else ""
            lines.append(f"{_where(failure)} failed after it, {_how(failure)}{': ' if first_line else ''}{first_line}")
    return "\n".join(lines)


def _joined(rank: int, code: int, filed: dict[str, Any]) -> Failure:
    return Failure(rank, filed["pid"], code, filed["time_s"], filed["type"], filed["message"], filed["traceback"])


def _where(failure: Failure) -> str:
    return f"rank {failure.rank} ({failure.host + ', ' if failure.host else ''}pid {failure.pid})"


def _how(failure: Failure) -> str:
    if failure.code > 128 and failure.kind.startswith("SIG"):
        hint = ", perhaps for lack of memory" if failure.kind == "SIGKILL" else ""
        return f"killed by {failure.kind}{hint} (exit code {failure.code})"
    return f"with {failure.kind} (exit code {failure.code})" if failure.kind else f"with exit code {failure.code}"


def signal_name(code: int) -> str:
    """Return the name of the signal that a shell's exit code stands for, "" for none."""
    try:
        return signal.Signals(code - 128).name if code > 128 else ""
    except ValueError:
        return ""
