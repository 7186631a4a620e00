"""The one logger: rank 0 speaks, other ranks only when something is wrong with them alone."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import TextIO

logger = logging.getLogger("craken")
_said: set[str] = set()


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at the time of the call, so that captured and redirected output is seen."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def rank() -> int:
    """Return this process's global rank as the launcher set it; 0 outside a launch."""
    return int(os.environ.get("RANK", "0"))


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log `message` on the given ranks only (default: rank 0; `[-1]`: every rank)."""
    chosen = (0,) if ranks is None else tuple(ranks)
    if rank() in chosen or -1 in chosen:
        logger.log(level, message if len(chosen) == 1 and chosen[0] == 0 else f"[rank {rank()}] {message}")


def warn_once(message: str) -> None:
    """Warn on rank 0, once a process for each distinct message."""
    if message not in _said:
        _said.add(message)
        log_dist(message, level=logging.WARNING)


def _set_up() -> None:
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("craken %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(os.environ.get("CRAKEN_LOG_LEVEL", "INFO").upper())
    logger.propagate = False


_set_up()
