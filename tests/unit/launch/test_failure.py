"""Which failure took the job down."""

from __future__ import annotations

import json
from pathlib import Path

from craken.launch.failure import Failure, first_cause, read_failure, read_filed, report, shell_code

CLOSED = "pair.cc:553] Connection closed by peer [127.0.0.1]:123"


def _failure(rank: int, time_s: float, message: str = "", traceback: str = "", code: int = 1) -> Failure:
    return Failure(rank, 100 + rank, code, time_s, "RuntimeError", message, traceback)


def _file(folder: Path, rank: int, attempt: int = 0) -> None:
    record = {"pid": 9, "attempt": attempt, "time_s": 2.5, "type": "KeyError", "message": "'x'", "traceback": "Trace"}
    (folder / f"{rank}.json").write_text(json.dumps(record))


def test_a_victim_is_never_the_cause_when_there_is_another() -> None:
    failures = [_failure(0, 1.0, CLOSED), _failure(2, 3.0, "later"), _failure(1, 2.0, "boom")]
    assert first_cause(failures).rank == 1
    assert first_cause(failures[:1]).rank == 0


def test_an_exit_code_is_a_shells() -> None:
    assert [shell_code(code) for code in (0, 7, -9, -15)] == [0, 7, 137, 143]


def test_what_a_rank_filed_is_joined_with_its_exit(tmp_path: Path) -> None:
    _file(tmp_path, 1)
    filed = read_failure(tmp_path, 1, 9, 1, exit_time_s=7.0)
    assert (filed.kind, filed.time_s, filed.traceback, filed.code) == ("KeyError", 2.5, "Trace", 1)
    killed = read_failure(tmp_path, 0, 8, -9, exit_time_s=7.0)
    assert (killed.kind, killed.time_s, killed.code) == ("SIGKILL", 7.0, 137)


def test_only_the_last_attempt_counts(tmp_path: Path) -> None:
    _file(tmp_path, 0, attempt=0)
    _file(tmp_path, 1, attempt=2)
    assert [failure.rank for failure in read_filed(tmp_path)] == [1]


def test_the_report_shows_one_traceback_and_a_line_for_each_victim() -> None:
    text = report([_failure(0, 1.0, CLOSED, "Traceback of 0"), _failure(1, 2.0, "boom", "Traceback of 1")])
    assert text.splitlines()[:2] == [
        "rank 1 (pid 101) failed first, with RuntimeError (exit code 1).",
        "Traceback of 1",
    ]
    assert "Traceback of 0" not in text
    assert "rank 0 (pid 100) failed after it" in text


def test_a_rank_that_waited_for_one_that_was_done_is_told_so() -> None:
    assert "rank 1 had exited with code 0" in report([_failure(0, 1.0, CLOSED)], finished_ranks=[1])
    assert "look at other hosts" in report([_failure(0, 1.0, CLOSED)])


def test_a_failure_survives_the_way_between_hosts() -> None:
    failure = _failure(3, 1.5, "ünï\nx", "Trace")
    assert Failure.from_json(failure.to_json()) == failure
