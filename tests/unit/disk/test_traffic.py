"""Bytes and busy seconds: what overlaps counts its time once, what fails counts no bytes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from craken.disk import Swap, Traffic
from craken.disk.traffic import Meter


def test_overlapping_transfers_count_their_time_once() -> None:
    meter = Meter()

    def move() -> None:
        with meter.moving(100):
            time.sleep(0.1)

    threads = [threading.Thread(target=move) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.num_bytes == 500
    assert 0.1 <= meter.busy_s < 0.3


def test_a_failed_transfer_counts_no_bytes() -> None:
    meter = Meter()
    with pytest.raises(OSError), meter.moving(100):  # noqa: PT011
        raise OSError("disk")
    assert meter.num_bytes == 0


def test_a_swap_counts_what_it_moves(tmp_path: Path) -> None:
    swap = Swap(tmp_path)
    file, values = swap.file("values", 100_000), torch.zeros(100_000, dtype=torch.uint8)
    file.write(values).wait()
    before = swap.traffic()
    file.read(values[:30_001], 5).wait()
    file.read(values[:10]).wait()
    between = swap.traffic() - before
    assert (before.written_bytes, before.read_bytes) == (100_000, 0)
    assert (between.written_bytes, between.read_bytes, between.write_s) == (0, 30_011, 0.0)
    assert 0 < between.read_s <= between.busy_s
    assert between.read_bytes_per_s == pytest.approx(between.read_bytes / between.read_s)
    swap.close()


def test_bandwidth_of_nothing_is_zero() -> None:
    assert (Traffic().read_bytes_per_s, Traffic().written_bytes_per_s) == (0.0, 0.0)
