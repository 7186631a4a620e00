"""Signals, the time limit, and the agreement of all ranks on one step to stop after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from craken.comm import world_axis
from craken.stop import StepEnd, Stop, Stopped, StopRequest, agree


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, Stop.INTERRUPTED), (signal.SIGTERM, Stop.TERMINATED)])
def test_a_signal_is_noted_and_the_step_goes_on(signum, expected) -> None:
    before = signal.getsignal(signum)
    with StopRequest().listening() as request:
        assert request.heard is None
        os.kill(os.getpid(), signum)
        time.sleep(0.01)
        assert request.heard is expected
        os.kill(os.getpid(), signum)  # the same press, delivered twice
        time.sleep(0.01)
    assert signal.getsignal(signum) is before


def test_where_there_is_nothing_to_finish_a_signal_is_raised_at_once_or_on_the_way_in() -> None:
    with StopRequest().listening() as request:
        with pytest.raises(Stopped) as caught, request.raising():
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.stop is Stop.TERMINATED
        with pytest.raises(Stopped), request.raising():
            pytest.fail("it was heard before")


def test_what_listens_is_there_before_torch() -> None:
    code = "import sys; from craken import StopRequest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_machine_taken_away_ends_well_and_ctrl_c_does_not() -> None:
    assert [stop.exit_code for stop in Stop] == [130, 0, 0]


def test_a_second_press_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from craken.stop import SAME_PRESS_S, StopRequest\n"
        "with StopRequest().listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(SAME_PRESS_S + 0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 130


def _agree(heard_by_rank: list[Stop | None]) -> tuple[StepEnd, Stop | None]:
    axis, request = world_axis(), StopRequest()
    request.heard = heard_by_rank[axis.rank]
    return agree(float(axis.rank + 1), request.heard, axis=axis), request.agreed()


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ([None, None], None),
        ([None, Stop.INTERRUPTED], Stop.INTERRUPTED),
        ([Stop.TERMINATED, None], Stop.TERMINATED),
        ([Stop.OUT_OF_TIME, Stop.INTERRUPTED], Stop.INTERRUPTED),
    ],
)
def test_all_ranks_leave_with_the_same_reason_and_the_mean_loss(run_ranks, heard, expected) -> None:
    assert run_ranks(_agree, 2, heard) == [((1.5, expected), expected)] * 2
