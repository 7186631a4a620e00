"""Measuring a disk: what is tried, what is recommended, and that all of the file is moved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from craken.disk import IoSettings
from craken.disk.measure import Speed, cheapest_good_one, measure, settings_to_try

KIB = 1 << 10


def _speed(depth: int, threads: int, write: float, read: float) -> Speed:
    return Speed(IoSettings(1 << 20, depth, threads), {"write": write, "read": read})


def test_what_is_given_is_not_varied() -> None:
    tried = settings_to_try(None, None, None)
    assert len(tried) == len(set(tried)) == 12
    assert {one.block_bytes for one in tried} == {1 << 20}
    assert settings_to_try(4096, 3, 5) == [IoSettings(4096, 3, 5)]
    assert [one.num_threads for one in settings_to_try(None, 2, None)] == [1, 2, 4, 8]


def test_the_cheapest_of_those_about_as_fast_as_the_fastest_is_recommended() -> None:
    speeds = [_speed(1, 1, 1e9, 1e9), _speed(8, 2, 2.9e9, 2e9), _speed(32, 2, 3e9, 2e9), _speed(32, 8, 3e9, 2.05e9)]
    assert cheapest_good_one(speeds) == speeds[1]


def test_a_setting_that_is_fast_one_way_only_is_not_recommended() -> None:
    speeds = [_speed(1, 1, 9e9, 1e9), _speed(8, 8, 3e9, 3e9)]
    assert cheapest_good_one(speeds) == speeds[1]


@pytest.mark.parametrize("num_bytes", [100, 64 * KIB, 300_000])
def test_every_number_moves_the_whole_file(tmp_path: Path, num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: dict[str, list[int]] = {"preadv": [], "pwritev": []}

    def counting(name: str) -> None:
        plain = getattr(os, name)

        def count(fd: int, buffers: list[memoryview], offset: int) -> int:
            moved[name].append(plain(fd, buffers, offset))
            return len(buffers[0])

        monkeypatch.setattr(os, name, count)

    counting("preadv")
    counting("pwritev")
    settings = [IoSettings(4096, 2, 2), IoSettings(32 * KIB, 1, 1)]
    measured = measure(tmp_path, num_bytes, settings, ["write", "read"])
    size = -(-num_bytes // 4096) * 4096
    times = len(settings) + 1  # and the plain loop
    assert sum(moved["pwritev"]) == (times + 1) * size
    assert sum(moved["preadv"]) == times * size + 4096  # the folder's check reads a block
    assert [speed.settings for speed in measured.speeds] == settings
    assert all(value > 0 for speed in (measured.plain, *measured.speeds) for value in speed.bytes_per_s.values())
    assert list(tmp_path.iterdir()) == []


def test_one_direction_can_be_measured_alone(tmp_path: Path) -> None:
    measured = measure(tmp_path, 8192, [IoSettings()], ["read"])
    assert [set(speed.bytes_per_s) for speed in (measured.plain, *measured.speeds)] == [{"read"}, {"read"}]
