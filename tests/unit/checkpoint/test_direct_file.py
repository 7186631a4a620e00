"""Bytes arrive in order and whole, whatever the disk takes, and what it refuses is raised."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from craken.checkpoint import direct_file
from craken.checkpoint.direct_file import new_file

DATA = os.urandom(100_003)


def put(path: Path, data: bytes, step: int) -> None:
    with new_file(path, len(data)) as file:
        for low in range(0, len(data), step):
            file.write(memoryview(data)[low : low + step])


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "BUFFER_BYTES", 8192)


@pytest.mark.parametrize("num_bytes", [1, 4096, 8191, 8192, 8193, 24576, 100_003])
@pytest.mark.parametrize("step", [7000, 8192, 200_000])
def test_bytes_arrive_in_order_and_no_more(tmp_path: Path, num_bytes: int, step: int) -> None:
    put(tmp_path / "f", DATA[:num_bytes], step)
    assert (tmp_path / "f").read_bytes() == DATA[:num_bytes]


def test_a_file_system_without_direct_writes_gets_ordinary_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    put(tmp_path / "f", DATA, 7000)
    assert (tmp_path / "f").read_bytes() == DATA


def test_short_writes_of_any_size_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: real(fd, [data[0][:1000]], offset))
    put(tmp_path / "f", DATA, 7000)
    assert (tmp_path / "f").read_bytes() == DATA


def test_what_the_disk_refuses_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def full(fd: int, data: list[memoryview], offset: int) -> int:
        if offset >= 40_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "f", DATA, 7000)
    num_fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "g", DATA, 7000)
    assert len(os.listdir("/proc/self/fd")) == num_fds
