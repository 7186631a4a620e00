"""Shows a run on the terminal: a live bar where there is one, plain lines elsewhere, nothing on ranks but the first."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from craken.train.huggingface import Completion
from craken.train.metrics import EvalMetrics, StepMetrics

SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress:
    """Shows what is being prepared and how far it is; use as a context manager, and the value as a callable.

    On a terminal one bar that goes away; elsewhere one line for each thing that is begun.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal and not console.quiet
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            console=console,
            transient=True,
            expand=True,
        )
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> PrepareProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def __call__(self, what: str, fraction: float) -> None:
        """Show that `what` is done by `fraction` of 1."""
        if not self._is_live:
            if what != self._what:
                self._console.print(what)
        elif self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(what, total=1.0)
        else:
            self._bar.update(self._task, description=what, completed=fraction)
        self._what = what


class RunProgress:
    """Shows steps and validations as they come; use as a context manager.

    On a terminal one bar with the figures of the newest step under it; elsewhere a line for the first and the last
    step and every ten seconds between. A console of another rank is given as quiet, and shows nothing.
    """

    def __init__(self, console: Console, *, num_steps: int, first_step: int, minutes: float | None) -> None:
        self._console = console
        self._num_steps = num_steps
        self._limit_s = None if minutes is None else minutes * 60
        self._last_line_s = -SECONDS_BETWEEN_LINES
        self._is_live = console.is_terminal and not console.quiet
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
            expand=True,
        )
        self._task: TaskID = self._bar.add_task("", total=num_steps, completed=first_step, eta="")
        self._live = Live(console=console, refresh_per_second=4, transient=True) if self._is_live else None

    def __enter__(self) -> RunProgress:
        if self._live:
            self._live.start()
            self._live.update(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show_step(self, row: StepMetrics) -> None:
        """Show one finished step."""
        eta = f"{_clock(self.remaining_s(row))} left"
        if self._live:
            self._bar.update(self._task, completed=row.step, eta=eta)
            self._live.update(Group(self._bar, _figures(row)))
        elif self._is_line_due(row.step):
            self._console.print(Text(f"step {row.step:>5}/{self._num_steps}  {_words(row)}  {eta}"), soft_wrap=True)

    def show_eval(self, row: EvalMetrics) -> None:
        """Show one validation, as a line that stays."""
        gap = row.unigram_entropy - row.val_loss
        text = Text.assemble(
            f"step {row.step:>5}/{self._num_steps}  ",
            ("validation loss ", "bold"),
            (f"{row.val_loss:.3f}", "bold green" if gap >= 1 else "bold"),
            f" nats/token, unigram entropy {row.unigram_entropy:.3f} ({gap:+.2f})",
        )
        self._console.print(text, soft_wrap=True)

    def remaining_s(self, row: StepMetrics) -> float:
        """Return the expected seconds to the end of training, by steps or by the time limit, whichever is nearer."""
        by_steps = (self._num_steps - row.step) * row.elapsed_s / max(1, row.step)
        return by_steps if self._limit_s is None else min(by_steps, max(0.0, self._limit_s - row.elapsed_s))

    def _is_line_due(self, step: int) -> bool:
        now = time.monotonic()
        if step < self._num_steps and now - self._last_line_s < SECONDS_BETWEEN_LINES:
            return False
        self._last_line_s = now
        return True


def show_facts(console: Console, facts: dict[str, str]) -> None:
    """Show what a run is, as a table of two columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)


def show_completion(console: Console, completion: Completion) -> None:
    """Show the prompt and what the model made of it, as it is (code has brackets of its own)."""
    text = Text.assemble((completion.prompt, "dim"), (completion.text, "bold"))
    if console.is_terminal:
        console.print(Panel(text, title="the saved model, loaded back, completes", title_align="left"))
    else:
        console.print(Text("\nthe saved model, loaded back, completes:"))
        console.print(text, soft_wrap=True)


def _words(row: StepMetrics) -> str:
    return "  ".join(f"{name} {value}" for name, value in _pairs(row))


def _figures(row: StepMetrics) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    for _ in _pairs(row):
        table.add_column()
    table.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in _pairs(row)))
    return table


def _pairs(row: StepMetrics) -> list[tuple[str, str]]:
    pairs = [
        ("loss", f"{row.loss:.3f}"),
        ("tokens/s", f"{row.tokens_per_s:,.0f}"),
        ("lr", f"{row.lr:.2e}"),
        ("grad norm", "-" if row.grad_norm is None else f"{row.grad_norm:.2f}"),
        ("memory", f"{row.memory_bytes / 2**30:.2f} GiB"),
        ("sent", f"{row.sent_bytes / 1e6:.1f} MB/step"),
    ]
    return [*pairs, ("skipped", str(row.skipped_steps))] if row.skipped_steps else pairs


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
