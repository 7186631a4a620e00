"""Turns Ctrl-C, SIGTERM and the end of the time into a stop that all ranks take after the same step.

Signals reach ranks at different moments, some ranks never. Each rank notes what it heard; at the end of every step the
ranks add their notes up (one all-reduce of four numbers, which carries the step's loss along), so all see the same sum
and leave together. A second signal ends this process at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import NamedTuple

import torch

from craken.comm import MeshAxis, all_reduce_sum

SAME_PRESS_S = 0.5  # a terminal and a launcher may both deliver one Ctrl-C


class Stop(Enum):
    """Why a run ends before its last step, the weightiest reason first; the value says it in a word."""

    INTERRUPTED = "Ctrl-C"
    TERMINATED = "SIGTERM"
    OUT_OF_TIME = "time"

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C; 0 for SIGTERM: a machine that is taken away has got what it asked for, a checkpoint."""
        return 130 if self is Stop.INTERRUPTED else 0


class StepEnd(NamedTuple):
    """What all ranks agreed on at the end of a step: the loss averaged over ranks, and whether to stop."""

    loss: float
    stop: Stop | None


class StopRequest:
    """What this rank has heard: nothing -> INTERRUPTED or TERMINATED, set once by the signal handler."""

    def __init__(self) -> None:
        self.heard: Stop | None = None
        self._heard_at_s = 0.0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT and SIGTERM for the time of the block."""
        previous = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.heard is not None and time.monotonic() - self._heard_at_s > SAME_PRESS_S:
            os._exit(128 + signum)
        if self.heard is None:
            self._heard_at_s = time.monotonic()
            self.heard = Stop.INTERRUPTED if signum == signal.SIGINT else Stop.TERMINATED


def agree(loss: float, heard: Stop | None, *, axis: MeshAxis, device: torch.device) -> StepEnd:
    """Collective over `axis`: return the mean loss and the weightiest reason to stop that any rank has."""
    reasons = list(Stop)
    notes = [loss, *(float(heard is reason) for reason in reasons)]
    summed = all_reduce_sum(torch.tensor(notes, dtype=torch.float64, device=device), axis, label="step end").tolist()
    stop = next((reason for reason, count in zip(reasons, summed[1:], strict=True) if count > 0), None)
    return StepEnd(summed[0] / axis.size, stop)
