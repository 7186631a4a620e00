"""The records that agents mix into their stderr."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from craken.launch.failure import Failure
from craken.launch.orders import _MARK, split_records

FAILURE = Failure(1, 2, 3, 4.5, "KeyError", "x")
RECORD = _MARK + FAILURE.to_json().encode() + b"\n"


def test_other_output_passes_through_at_once() -> None:
    assert split_records(b"42%\r43%") == (b"42%\r43%", [], b"")
    assert split_records(b"a\x1eb\x1e[0m") == (b"a\x1eb\x1e[0m", [], b"")


def test_a_record_is_taken_out() -> None:
    assert split_records(b"a" + RECORD + b"b" + RECORD) == (b"ab", [FAILURE, FAILURE], b"")


@given(st.lists(st.sampled_from([b"x", b"\x1e", b"\n", b"\x1ecraken", RECORD]), max_size=6), st.integers(1, 40))
def test_however_the_stream_is_cut_nothing_is_lost(parts: list[bytes], size: int) -> None:
    stream = b"".join(parts)
    whole = split_records(stream)
    shown, failures, rest = b"", [], b""
    for start in range(0, len(stream), size):
        piece, found, rest = split_records(rest + stream[start : start + size])
        shown, failures = shown + piece, failures + found
    assert (shown, failures, rest) == whole
