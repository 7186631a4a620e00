"""What a terminal shows, what a log shows, and that other ranks show nothing."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from craken.train.metrics import EvalMetrics, StepMetrics
from craken.train.progress import PrepareProgress, RunProgress

ROW = StepMetrics(3, 4.25, 1e-3, 0.5, 300, 1234.0, 0.5, 30.0, 2**30, 2**30, 5_500_000, 0)


def _console(**options) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=140, highlight=False, **options), out


def test_a_log_gets_the_first_and_the_last_step_as_plain_lines() -> None:
    console, out = _console()
    with RunProgress(console, num_steps=12, first_step=0, minutes=None) as progress:
        for step in range(1, 13):
            progress.show_step(replace(ROW, step=step, elapsed_s=step * 10.0))
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "step     1/12  loss 4.250  tokens/s 1,234  lr 1.00e-03  grad norm 0.50  memory 1.00 GiB"
    )
    assert lines[0].endswith("sent 5.5 MB/step  1:50 left")
    assert lines[1].startswith("step    12/12")
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_bar_that_is_updated_in_place() -> None:
    console, out = _console(force_terminal=True)
    with RunProgress(console, num_steps=12, first_step=0, minutes=None) as progress:
        progress.show_step(ROW)
        progress.show_eval(EvalMetrics(3, 4.0, 6.0, 100, 30.0))
    shown = out.getvalue()
    for word in ("training", "3/12", "4.250", "1,234", "5.5 MB/step", "1:30 left", "validation loss"):
        assert word in shown
    assert "\x1b[1A" in shown or "\x1b[2K" in shown


def test_skipped_steps_are_shown_when_there_are_any() -> None:
    console, out = _console()
    progress = RunProgress(console, num_steps=3, first_step=0, minutes=None)
    progress.show_step(replace(ROW, skipped_steps=2))
    assert "skipped 2" in out.getvalue()


def test_the_time_left_is_that_of_the_nearer_end() -> None:
    console, _ = _console()
    assert RunProgress(console, num_steps=30, first_step=0, minutes=None).remaining_s(ROW) == 270.0
    assert RunProgress(console, num_steps=30, first_step=0, minutes=1.0).remaining_s(ROW) == 30.0


def test_other_ranks_show_nothing() -> None:
    console, out = _console(quiet=True, force_terminal=True)
    with PrepareProgress(console) as report, RunProgress(console, num_steps=3, first_step=0, minutes=None) as progress:
        report("tokenising", 0.5)
        progress.show_step(ROW)
        progress.show_eval(EvalMetrics(3, 4.0, 6.0, 100, 30.0))
    assert out.getvalue() == ""


def test_preparing_says_each_thing_once_in_a_log() -> None:
    console, out = _console()
    with PrepareProgress(console) as report:
        for fraction in (0.0, 0.5, 1.0):
            report("tokenising", fraction)
    assert out.getvalue() == "tokenising\n"
