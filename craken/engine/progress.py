"""What the engine reports while training: a line every so many steps, skipped steps, scalars for monitors."""

from __future__ import annotations

import math
import time
from typing import Protocol

from torch import Tensor

from craken.engine.accumulation import Accumulation
from craken.engine.monitor import Monitor, Scalar
from craken.engine.timers import PhaseTimers
from craken.log import log_dist


class Reported(Protocol):
    """What a report is made from."""

    global_steps: int
    skipped_steps: int
    accumulation: Accumulation

    def get_lr(self) -> list[float]: ...
    def get_global_grad_norm(self) -> float | None: ...
    def train_batch_size(self) -> int: ...
    def get_loss_scale(self) -> float: ...


class Progress:
    """Keeps the last loss and prints a line every `steps_per_print` steps on rank 0."""

    def __init__(self, steps_per_print: float | None, monitor: Monitor, timers: PhaseTimers) -> None:
        self._every = int(steps_per_print) if steps_per_print and math.isfinite(steps_per_print) else 0
        self._monitor, self._timers = monitor, timers
        self._loss: Tensor | None = None
        self._since, self._steps = time.perf_counter(), 0

    def note_loss(self, loss: Tensor) -> None:
        """Remember the loss of the last micro-batch; read only when a line is due."""
        if self._every or self._monitor.is_on:
            self._loss = loss.detach()

    def note_skip(self, step: int, scale_before: float, scale_after: float) -> None:
        """Say that a step was skipped because gradients were not finite."""
        moved = f"; loss scale {scale_before:g} -> {scale_after:g}" if scale_before != scale_after else ""
        log_dist(f"step {step} skipped: a gradient is inf or nan{moved}")

    def note_step(self, engine: Reported) -> None:
        """Report a finished step where one is due."""
        self._steps += 1
        if self._monitor.is_on:
            self._monitor.write(self._scalars(engine))
        if self._every and engine.global_steps % self._every == 0:
            self._print(engine)

    def _print(self, engine: Reported) -> None:
        now = time.perf_counter()
        rate = self._steps * engine.train_batch_size() / max(now - self._since, 1e-9)
        loss = "-" if self._loss is None else f"{float(self._loss):.4f}"
        rates = ", ".join(f"{lr:.4g}" for lr in engine.get_lr())
        norm = engine.get_global_grad_norm()
        log_dist(
            f"step {engine.global_steps}: loss {loss}, lr {rates}, grad norm {math.nan if norm is None else norm:.4g}, "
            f"skipped {engine.skipped_steps}, {rate:.1f} samples/s"
        )
        if self._timers.is_on:
            log_dist(self._timers.report(self._steps))
        self._since, self._steps = now, 0

    def _scalars(self, engine: Reported) -> list[Scalar]:
        samples = engine.global_steps * engine.train_batch_size()
        scalars = [Scalar("Train/Samples/lr", lr, samples) for lr in engine.get_lr()[:1]]
        scalars.append(Scalar("Train/Samples/loss_scale", engine.get_loss_scale(), samples))
        if self._loss is not None:
            scalars.append(Scalar("Train/Samples/train_loss", float(self._loss), samples))
        norm = engine.get_global_grad_norm()
        if norm is not None:
            scalars.append(Scalar("Train/Samples/grad_norm", norm, samples))
        return scalars
