"""Turns Ctrl-C and SIGTERM into a stop that all ranks take after the same step.

    with StopRequest().listening() as request:
        for batch in batches:
            engine.backward(engine(batch))
            engine.step()
            if stop := request.agreed():
                engine.save_checkpoint(folder)
                sys.exit(stop.exit_code)

Signals reach ranks at different moments, some ranks never. Each rank notes what it heard; `agreed` adds the notes up
(one all-reduce of four numbers), so all see the same sum and leave together. A second signal ends this process at once.
Imports nothing that takes time: what comes while a program still imports torch is heard too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from craken.comm import MeshAxis

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


class Stopped(BaseException):
    """A signal came while there was nothing to finish; no Exception, so that none takes it for an error."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.value)
        self.stop = stop


class StopRequest:
    """What this rank has heard: nothing -> INTERRUPTED or TERMINATED, set once by the signal handler."""

    def __init__(self) -> None:
        self.heard: Stop | None = None
        self._heard_at_s = 0.0
        self._raises = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT and SIGTERM for the time of the block, in the main thread."""
        previous = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise `Stopped` in this block for what was or is heard: for work of one process that may end anywhere."""
        self._raises = True
        try:
            if self.heard is not None:
                raise Stopped(self.heard)
            yield
        finally:
            self._raises = False

    def agreed(self, axis: MeshAxis | None = None) -> Stop | None:
        """Collective over `axis` (default: all ranks): return the weightiest reason to stop that any rank has heard."""
        from craken.comm import world_axis

        return agree(0.0, self.heard, axis=axis or world_axis()).stop

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.heard is not None and time.monotonic() - self._heard_at_s > SAME_PRESS_S:
            os._exit(128 + signum)
        if self.heard is None:
            self._heard_at_s = time.monotonic()
            self.heard = Stop.INTERRUPTED if signum == signal.SIGINT else Stop.TERMINATED
            if self._raises:
                raise Stopped(self.heard)


def agree(loss: float, heard: Stop | None, *, axis: MeshAxis) -> StepEnd:
    """Collective over `axis`: return the mean loss and the weightiest reason to stop that any rank has."""
    import torch

    from craken.comm import all_reduce_sum

    notes = torch.tensor([loss, *(float(heard is stop) for stop in Stop)], dtype=torch.float64, device="cpu")
    summed = all_reduce_sum(notes, axis, label="step end").tolist()
    stop = next((stop for stop, count in zip(Stop, summed[1:], strict=True) if count > 0), None)
    return StepEnd(summed[0] / axis.size, stop)
