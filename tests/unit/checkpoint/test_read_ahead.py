"""Small ranges of files in a store, a window at a time."""

from __future__ import annotations

import pytest

from craken.checkpoint.read_ahead import ReadAhead


@pytest.mark.parametrize("num_files", [1, 33, 500])
def test_files_read_side_by_side_do_not_push_each_other_out(num_files: int) -> None:
    data, requests = bytes(range(256)) * 16384, []

    def fetch(start: int, end: int) -> bytes:
        requests.append(end - start)
        return data[start:end]

    ahead = ReadAhead(num_files)
    for start in range(0, 6400, 64):
        for file in map(str, range(num_files)):
            assert ahead.read(file, start, 64, fetch) == data[start : start + 64]
    assert len(requests) == num_files
    assert sum(requests) <= 32 << 20


def test_large_ranges_and_ends_of_files_are_fetched_as_they_are() -> None:
    data = bytes(range(256)) * 16384
    ahead = ReadAhead(1)
    assert ahead.read("a", 5, 3 << 20, lambda start, end: data[start:end]) == data[5 : 5 + (3 << 20)]
    assert ahead.read("a", len(data) - 10, 64, lambda start, end: data[start:end]) == data[-10:]
