"""Core lists and shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from craken.launch.cores import _quota_cores, parse_core_list, split_cores, threads_per_rank


def test_a_core_list_holds_numbers_and_ranges() -> None:
    assert parse_core_list("1,3-5,7") == [1, 3, 4, 5, 7]


@pytest.mark.parametrize("text", ["", "a", "1-", "-2", "3-1", "1,1", "0-2,2", "1,,2"])
def test_a_bad_core_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--bind_core_list"):
        parse_core_list(text)


def test_ranks_get_equal_runs_of_cores() -> None:
    assert split_cores([0, 1, 2, 3, 8], 2) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="cannot bind 3 ranks to 2 cores"):
        split_cores([0, 1], 3)


def test_a_rank_gets_at_least_one_thread() -> None:
    assert threads_per_rank(10_000) == 1


@pytest.mark.parametrize(("text", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 1 << 20)])
def test_a_containers_quota_counts_as_cores(tmp_path: Path, text: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert _quota_cores(tmp_path / "cpu.max") == cores
    assert _quota_cores(tmp_path / "none") == 1 << 20
