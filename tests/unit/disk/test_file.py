"""Tensors written to a file and read back, in any size, at any offset, many at a time, and what fails is said."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from craken.disk import Swap, pages, transfer

PAGE = 4096


def _random_bytes(num_bytes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, PAGE, PAGE + 1, 5 * PAGE - 1, 100_003])
@pytest.mark.parametrize("offset", [0, 1, 512, PAGE, 3 * PAGE + 7])
def test_odd_sizes_come_back_at_odd_offsets(swap: Swap, num_bytes: int, offset: int) -> None:
    file, source = swap.file("odd", offset + num_bytes), _random_bytes(num_bytes)
    file.write(source, offset).wait()
    into = torch.zeros(num_bytes, dtype=torch.uint8)
    file.read(into, offset).wait()
    assert torch.equal(into, source)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_writes_leave_their_neighbours_alone(swap: Swap, data: st.DataObject) -> None:
    """Against a plain tensor: writes of any shape from memory of any alignment, then the whole file read."""
    num_bytes = 9 * PAGE + 5
    file, model, memory = swap.file("model", num_bytes), _random_bytes(num_bytes), pages(num_bytes + PAGE)
    file.write(model).wait()
    for seed in range(1, 4):
        begin = data.draw(st.integers(0, num_bytes))
        end = data.draw(st.integers(begin, num_bytes))
        source = memory[data.draw(st.sampled_from([0, 64, 512, begin % PAGE])) :][: end - begin]
        source.copy_(_random_bytes(end - begin, seed))
        model[begin:end] = source
        file.write(source, begin).wait()
    into = memory[64:][:num_bytes]
    file.read(into).wait()
    assert torch.equal(into, model)
    file.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_any_dtype_and_shape_travels_as_its_bytes(swap: Swap, dtype: torch.dtype) -> None:
    source = torch.randn(7, 33).to(dtype)
    file = swap.file("dtype", source.nbytes)
    file.write(source).wait()
    into = torch.empty_like(source)
    file.read(into).wait()
    assert torch.equal(into.view(torch.uint8), source.view(torch.uint8))


def test_a_parameter_is_written_and_read_in_place(swap: Swap) -> None:
    weight = torch.nn.Parameter(torch.randn(1000))
    file, before = swap.file("weight", weight.nbytes), weight.detach().clone()
    file.write(weight).wait()
    with torch.no_grad():
        weight.zero_()
    file.read(weight).wait()
    assert torch.equal(weight.detach(), before)


def test_many_requests_are_in_flight_at_a_time(swap: Swap) -> None:
    """Ragged neighbours too: each page is shared by two requests."""
    each, num = 3 * PAGE + 100, 40
    file, sources = swap.file("many", each * num), [_random_bytes(each, seed) for seed in range(num)]
    for ticket in [file.write(source, each * at) for at, source in enumerate(sources)]:
        ticket.wait()
    intos = [torch.empty_like(source) for source in sources]
    for ticket in [file.read(into, each * at) for at, into in enumerate(intos)]:
        ticket.wait()
    assert all(torch.equal(into, source) for into, source in zip(intos, sources, strict=True))


def test_aligned_memory_goes_to_the_disk_in_one_piece_after_another(
    swap: Swap, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    plain = os.pwritev

    def noted(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append((offset, len(buffers[0])))
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", noted)
    swap.file("aligned", 5 * PAGE).write(pages(5 * PAGE)).wait()
    assert sorted(calls) == [(0, 2 * PAGE), (2 * PAGE, 2 * PAGE), (4 * PAGE, PAGE)]


def test_a_transfer_that_stops_halfway_goes_on(swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_read, plain_write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: plain_read(fd, [buffers[0][:PAGE]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: plain_write(fd, [buffers[0][:PAGE]], offset))
    file, source, into = swap.file("halves", 6 * PAGE), pages(6 * PAGE), pages(6 * PAGE)
    source.copy_(_random_bytes(6 * PAGE))
    file.write(source).wait()
    file.read(into).wait()
    assert torch.equal(into, source)


def test_a_failed_piece_is_told_with_operation_place_and_reason(swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = swap.file("exp_avg of group 3", 8 * PAGE)
    monkeypatch.setattr(os, "pwritev", fail)
    ticket = file.write(pages(2 * PAGE), PAGE)
    for _ in range(2):  # however often it is asked
        with pytest.raises(
            OSError, match=r"write of 8,192 bytes at 4,096 of swap file 'exp_avg of group 3' failed: In"
        ):
            ticket.wait()


def test_a_failure_is_told_only_once_nothing_is_on_its_way(swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the memory would be freed under a transfer."""
    plain, may_go_on = os.preadv, threading.Event()

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == 0:
            may_go_on.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        may_go_on.wait(10)
        return plain(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    ticket = swap.file("slow", 6 * PAGE).read(pages(6 * PAGE))
    with pytest.raises(OSError, match="read of"):
        ticket.wait()
    assert ticket.is_done


def test_a_file_cut_short_behind_our_back_is_an_error_not_zeros(swap: Swap) -> None:
    file = swap.file("short", 8 * PAGE)
    descriptor = file._file
    assert isinstance(descriptor, transfer.OpenFile)
    os.ftruncate(descriptor.fd, 3 * PAGE)
    with pytest.raises(OSError, match=r"read of 32,768 bytes at 0 of swap file 'short' failed"):
        file.read(pages(8 * PAGE)).wait()


def test_a_mapping_shows_what_was_written_and_writes_through(swap: Swap) -> None:
    numel = 10_000
    file, buffer = swap.file("states", 4 * numel), pages(4 * numel)
    values = buffer.view(torch.float32)[:numel]
    mapped = file.mapped(torch.float32, numel)
    for step in range(3):
        values.copy_(torch.randn(numel) + step)
        file.write(values).wait()
        assert torch.equal(mapped, values), "a direct write is not seen by a mapping that was looked at before"
        mapped[17:5000] += 1
        expected = mapped.clone()
        values.zero_()
        file.read(values).wait()
        assert torch.equal(values, expected), "a write through the mapping is not seen by a direct read"


def test_a_mapping_may_begin_anywhere_and_outlives_its_file(swap: Swap) -> None:
    file, source = swap.file("parts", 8 * 3000), torch.arange(3000)
    file.write(source).wait()
    mapped = file.mapped(torch.int64, 1000, offset=8 * 1500)
    file.close()
    swap.close()
    assert torch.equal(mapped, source[1500:2500])
    assert mapped.untyped_storage().nbytes() < 8 * 3000


def test_a_mapping_of_nothing_is_an_empty_tensor(swap: Swap) -> None:
    assert swap.file("empty", 0).mapped(torch.float32, 0).shape == (0,)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda file: file.read(torch.empty(3, 4).t()), "expected a contiguous tensor on the host"),
        (lambda file: file.write(torch.empty(4, device="meta")), "on meta"),
        (lambda file: file.write(torch.empty(10), 80), "write of 40 bytes at 80: swap file 'small' has 100 bytes"),
        (lambda file: file.read(torch.empty(1), -4), "read of 4 bytes at -4"),
        (lambda file: file.mapped(torch.float32, 26), "map of 104 bytes at 0"),
        (lambda file: file.mapped(torch.float32, 1, 2), "expected a multiple of 4 for torch.float32"),
    ],
)
def test_what_cannot_be_moved_is_refused_at_once(swap: Swap, call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(swap.file("small", 100))


def test_a_closed_file_says_so(swap: Swap) -> None:
    file = swap.file("gone", 100)
    file.close()
    with pytest.raises(RuntimeError, match="'gone' is closed"):
        file.read(torch.empty(1))


def test_closing_a_file_in_flight_lets_its_requests_finish(swap: Swap) -> None:
    """And its descriptor's number goes to nobody else meanwhile."""
    first, source = swap.file("first", 200 * PAGE), _random_bytes(200 * PAGE)
    mapped = first.mapped(torch.uint8, 200 * PAGE)
    ticket = first.write(source)
    first.close()
    second = swap.file("second", 200 * PAGE)
    ticket.wait()
    into = torch.ones(200 * PAGE, dtype=torch.uint8)
    second.read(into).wait()
    assert torch.equal(mapped, source)
    assert into.count_nonzero() == 0
