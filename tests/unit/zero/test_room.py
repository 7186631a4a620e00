"""Memory for weights that comes and goes at one address."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from craken.zero.memory.room import IdlePages, Room, mapped_bytes, room_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_memory_comes_back_at_the_same_address(dtype) -> None:
    room = room_for(3_000_001, dtype, torch.device("cpu"))
    address = room.flat.data_ptr()
    alias = room.flat.view(-1)[5:10]
    room.flat.fill_(3)
    assert room.num_bytes >= 3_000_001 * dtype.itemsize
    room.give_back()
    assert room.num_bytes == 0
    room.take()
    assert room.flat.data_ptr() == address
    room.flat.fill_(7)
    assert alias.tolist() == [7] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("numel", [3, 100_001])
def test_what_is_given_back_reads_as_nan_where_that_is_asked_for(monkeypatch, dtype, numel) -> None:
    monkeypatch.setenv("CRAKEN_DEBUG_FREED", "1")
    room = room_for(numel, dtype, torch.device("cpu"))
    alias = room.flat[1:]
    room.flat.fill_(3)
    room.give_back()
    assert room.num_bytes == 0
    assert (alias.isnan() if dtype.is_floating_point else alias == 255).all()
    room.take()
    assert room.num_bytes == numel * dtype.itemsize
    room.flat.fill_(7)
    assert alias.eq(7).all()


def test_what_is_mapped_is_counted_until_it_goes() -> None:
    gc.collect()
    before = mapped_bytes()
    kept = room_for(1 << 20, torch.float32, torch.device("cpu")).flat.copy_(torch.arange(1 << 20))
    assert kept[-1] == (1 << 20) - 1
    assert mapped_bytes() - before == 4 << 20
    del kept
    gc.collect()
    assert mapped_bytes() == before


def rooms_with(idle: IdlePages, *numels: int) -> list[Room]:
    rooms = [room_for(numel, torch.float32, torch.device("cpu"), idle) for numel in numels]
    for value, room in enumerate(rooms):
        room.flat.fill_(value)
    return rooms


def open_pages(limit: int) -> IdlePages:
    idle = IdlePages()
    idle.limit = limit
    idle.open(True)
    return idle


def empty(room: Room, idle: IdlePages) -> None:
    """Have the room and the idle pages let go of all memory."""
    room.give_back()
    idle.open(False)
    idle.open(True)


def a_room_and_an_empty_one(numel: int) -> tuple[IdlePages, Room, Room]:
    """Return what their pages may wait in, a room, and one of its size that has no pages."""
    idle = open_pages(64 << 20)
    first, second = rooms_with(idle, numel, numel)
    empty(second, idle)
    return idle, first, second


@pytest.mark.parametrize("numel", [1 << 20, 700_001])  # huge pages, and small ones with a part of one at the end
def test_pages_move_to_the_next_room_of_their_size(numel) -> None:
    before = mapped_bytes()
    idle, first, second = a_room_and_an_empty_one(numel)
    addresses = first.flat.data_ptr(), second.flat.data_ptr()
    first.flat.fill_(7)
    first.give_back()
    assert (first.num_bytes, idle.num_bytes) == (0, mapped_bytes() - before)
    second.take()
    assert (second.num_bytes, idle.num_bytes) == (mapped_bytes() - before, 0)
    assert second.flat.eq(7).all(), "these are not the pages that the first room gave back"
    first.take()
    assert first.flat.eq(0).all()
    assert (first.flat.data_ptr(), second.flat.data_ptr()) == addresses


def test_a_room_finds_its_own_pages_again() -> None:
    idle = open_pages(64 << 20)
    (room,) = rooms_with(idle, 1 << 20)
    room.flat.fill_(5)
    room.give_back()
    room.take()
    assert room.flat.eq(5).all()
    assert idle.num_bytes == 0


def test_idle_pages_are_no_more_than_the_limit_and_go_where_nothing_will_come() -> None:
    idle = open_pages(5 << 20)
    before = mapped_bytes()
    rooms = rooms_with(idle, 1 << 20, 1 << 20, 1 << 20)
    for room in rooms:
        room.give_back()
    assert idle.num_bytes == mapped_bytes() - before == 4 << 20
    idle.open(False)
    assert idle.num_bytes == mapped_bytes() - before == 0
    rooms[0].take()
    rooms[0].give_back()
    assert idle.num_bytes == 0, "nothing is kept while it is not open"


def test_pages_that_fit_nobody_make_way() -> None:
    idle = open_pages(64 << 20)
    before = mapped_bytes()
    small, other, large = rooms_with(idle, 1 << 20, 1 << 20, 2 << 20)
    for room in (large, small, other):
        empty(room, idle)
    small.take()
    other.take()
    small.give_back()
    other.give_back()
    assert mapped_bytes() - before == 8 << 20
    large.take()
    assert mapped_bytes() - before == 8 << 20, "idle pages and rooms took more than rooms did"


def test_a_system_that_cannot_move_pages_gives_new_ones(monkeypatch) -> None:
    monkeypatch.setattr("craken.zero.memory.room._remap", lambda source, target, size: False)
    idle, first, second = a_room_and_an_empty_one(1 << 20)
    first.give_back()
    second.take()
    assert second.flat.eq(0).all()
    assert idle.num_bytes == 0


def test_reading_what_was_given_back_is_forbidden_while_pages_wait_and_after_they_moved() -> None:
    _, first, second = a_room_and_an_empty_one(1 << 20)
    first.give_back()
    assert rights_at(first.flat.data_ptr()) == "---p"
    second.take()
    assert (rights_at(first.flat.data_ptr()), rights_at(second.flat.data_ptr())) == ("---p", "rw-p")


def test_nothing_of_a_room_stays_in_memory_nor_counts_as_data() -> None:
    before = resident_and_data()
    room = room_for(5 << 18, torch.float32, torch.device("cpu"))  # 5 MB: two huge pages and a half
    room.flat.fill_(1)
    resident, data = (now - then for now, then in zip(resident_and_data(), before, strict=True))
    assert 4 << 20 <= resident <= 6 << 20
    assert 5 << 20 <= data < 6 << 20, "address space for alignment counts against a limit on data"
    room.give_back()
    resident, data = (now - then for now, then in zip(resident_and_data(), before, strict=True))
    assert resident < 1 << 20
    assert data < 1 << 20


def resident_and_data() -> tuple[int, int]:
    """Return this process's resident bytes, and those that RLIMIT_DATA counts."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) << 10, int(status["VmData"].split()[0]) << 10


def rights_at(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights, *_ = line.split()
        start, end = (int(part, 16) for part in where.split("-"))
        if start <= address < end:
            return rights
    raise AssertionError("nothing is mapped there")
