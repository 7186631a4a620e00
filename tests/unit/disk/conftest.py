"""A swap, once with direct I/O and once on a file system that refuses it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from craken.disk import IoSettings, Swap

SMALL = IoSettings(block_bytes=4096, queue_depth=2, num_threads=3)  # 8 KiB a piece


@pytest.fixture
def without_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every opening for direct I/O fail as on a file system that has none."""
    plain_open = os.open

    def refuse(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return plain_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)


@pytest.fixture(params=["direct", "buffered"])
def swap(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Swap]:
    if request.param == "buffered":
        request.getfixturevalue("without_direct_io")
    made = Swap(tmp_path, SMALL)
    if request.param == "direct" and not made.is_direct:
        pytest.skip(f"no direct I/O in {tmp_path}")
    yield made
    made.close()
