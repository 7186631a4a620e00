"""Who writes what."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craken.checkpoint.entry import Entry
from craken.checkpoint.plan import assign_writers


def part(fqn: str, low: int, high: int, *, total: int = 12, dtype: str = "F32") -> Entry:
    return Entry("param", fqn, (total,), dtype, low, high - low)


def test_shards_are_written_by_those_who_hold_them() -> None:
    entries = [[part("w", 0, 5), part("b", 0, 0, total=3)], [part("b", 0, 3, total=3), part("w", 5, 12)]]
    assert assign_writers(entries) == [[0], [0, 1]]


def test_replicas_are_shared_out_by_bytes() -> None:
    replicas = [part(f"w{i}", 0, 12) for i in range(6)]
    writes = assign_writers([replicas, replicas, replicas])
    assert [len(positions) for positions in writes] == [2, 2, 2]
    assert sorted(i for positions in writes for i in positions) == list(range(6))


def test_replicas_go_to_the_rank_with_less_of_its_own() -> None:
    entries = [[part("w", 0, 12), part("own", 0, 1000, total=1000)], [part("w", 0, 12)]]
    assert assign_writers(entries) == [[1], [0]]


def test_a_tensor_without_elements_needs_no_writer() -> None:
    assert assign_writers([[part("w", 0, 0, total=0)], []]) == [[], []]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([[part("w", 0, 5)], [part("w", 6, 12)]], r"param of w: nobody holds elements \[5, 6\).*ranks \[1\]"),
        ([[part("w", 0, 5)], [part("w", 4, 12)]], r"two different pieces hold elements \[4, 5\)"),
        ([[part("w", 0, 5)], []], r"nobody holds elements \[5, 12\) of shape \(12,\)"),
        ([[part("w", 0, 12), part("w", 0, 12)]], r"elements \[0, 12\) came twice from one of the ranks \[0, 0\]"),
        ([[part("w", 0, 12)], [part("w", 0, 12, dtype="BF16")]], "rank 0 has.*F32, rank 1 has.*BF16"),
        ([[part("w", 0, 12)], [part("w", 0, 9, total=9)]], r"rank 1 has shape \(9,\)"),
    ],
)
def test_what_does_not_make_up_a_tensor_is_refused(entries: list[list[Entry]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_writers(entries)


@given(
    total=st.integers(1, 60),
    cuts=st.sets(st.integers(1, 59), max_size=6),
    holders=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=7, max_size=7),
)
def test_every_element_is_written_once(total: int, cuts: set[int], holders: list[set[int]]) -> None:
    bounds = [0, *sorted(cut for cut in cuts if cut < total), total]
    entries: list[list[Entry]] = [[] for _ in range(4)]
    for (low, high), ranks in zip(itertools.pairwise(bounds), holders, strict=False):
        for rank in ranks:
            entries[rank].append(part("w", low, high, total=total))
    written = [entries[rank][i] for rank, positions in enumerate(assign_writers(entries)) for i in positions]
    elements = sorted(e for entry in written for e in range(entry.offset, entry.offset + entry.numel))
    assert elements == list(range(total))
