"""Buffers: page-aligned, reused, and never more than planned."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from craken.disk import Buffers, pages


def test_pages_are_aligned_zeroed_and_whole() -> None:
    memory = pages(5000)
    assert (memory.dtype, memory.numel(), memory.data_ptr() % 4096) == (torch.uint8, 8192, 0)
    assert memory.count_nonzero() == 0


def test_no_more_than_planned_exist_however_many_want_one() -> None:
    buffers, seen, busy, most = Buffers(3, 10_000), set(), 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal busy, most
        for _ in range(20):
            buffer = buffers.take()
            with lock:
                seen.add(buffer.data_ptr())
                busy += 1
                most = max(most, busy)
            time.sleep(0.0002)
            with lock:
                busy -= 1
            buffers.give_back(buffer)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 3
    assert len(seen) <= 3


def test_a_buffer_is_made_only_when_none_is_free() -> None:
    buffers = Buffers(2, 4096)
    first = buffers.take()
    buffers.give_back(first)
    assert buffers.take().data_ptr() == first.data_ptr()
    assert buffers.take().data_ptr() != first.data_ptr()


def test_take_waits_until_one_is_given_back() -> None:
    buffers = Buffers(1, 4096)
    buffer = buffers.take()
    timer = threading.Timer(0.05, buffers.give_back, [buffer])
    timer.start()
    assert buffers.take(timeout_s=10).data_ptr() == buffer.data_ptr()
    timer.join()


def test_waiting_for_oneself_is_an_error_in_the_end() -> None:
    buffers = Buffers(1, 4096)
    buffers.take()
    with pytest.raises(RuntimeError, match="all 1 buffers of 4,096 bytes have been out for 0 s"):
        buffers.take(timeout_s=0.01)


def test_giving_back_twice_or_something_else_is_refused() -> None:
    buffers = Buffers(2, 4096)
    buffer = buffers.take()
    buffers.give_back(buffer)
    for wrong in (buffer, torch.empty(4096, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected a buffer that is out"):
            buffers.give_back(wrong)


def test_a_view_of_a_buffer_gives_back_the_whole() -> None:
    buffers = Buffers(1, 8192)
    buffers.give_back(buffers.take().view(torch.float32)[:10])
    assert buffers.take().numel() == 8192


def test_freed_pages_leave_the_process() -> None:
    def resident_bytes() -> int:
        return int(open("/proc/self/statm").read().split()[1]) * 4096

    before = resident_bytes()
    memory = pages(64 << 20).fill_(1)
    assert resident_bytes() > before + (60 << 20)
    del memory
    assert resident_bytes() < before + (8 << 20)


@pytest.mark.parametrize(("num", "num_bytes"), [(0, 10), (1, 0)])
def test_no_buffers_are_no_pool(num: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match="expected at least one buffer"):
        Buffers(num, num_bytes)
