"""Carries ranks' output: inherited as it is, or copied to one log file a rank on its way through."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 16


class RankLogs:
    """Copies each rank's stdout and stderr to `folder/<time>_rank<R>.log` while it still streams through.

    Without a folder nothing is copied and ranks write straight to the launcher's own streams, so that a terminal is
    a terminal for them. With one they write to pipes, and a progress bar falls back to plain lines, as a log wants.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._stamp = time.strftime("%Y%m%d%H%M%S")
        self._threads: list[threading.Thread] = []
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"--enable_each_rank_log: expected a folder, got the file {folder}; name another place")
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def target(self) -> int | None:
        """What to hand to Popen as stdout and stderr."""
        return None if self._folder is None else subprocess.PIPE

    def follow(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """Start to copy a rank's output; no-op without a folder."""
        if self._folder is None:
            return
        log = open(self._folder / f"{self._stamp}_rank{rank}.log", "ab", buffering=0)  # noqa: SIM115 both threads' end closes it
        for source, screen in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert source is not None
            thread = threading.Thread(target=_copy, args=(source, log, screen.buffer), daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self, timeout_s: float = 2.0) -> None:
        """Wait until what the ranks wrote has gone through; a grandchild that holds a pipe open is not waited for."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _copy(source: BinaryIO, log: BinaryIO, screen: BinaryIO) -> None:
    while chunk := source.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]
        log.write(chunk)
        screen.write(chunk)
        screen.flush()
