"""Measures what a disk gives, in a plain loop of direct calls and through this room under one setting after another.

Other work on the machine comes and goes, so everything is measured in turn, five times over, each time on another part
of the file, and medians count:

    part 1:  plain, setting 1, setting 2, ...     part 2:  plain, setting 1, ...     ...
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from craken.disk.file import SwapFile
from craken.disk.folder import check_folder, check_room, create_file
from craken.disk.memory import pages
from craken.disk.mover import Mover, Ticket
from craken.disk.settings import IoSettings, round_up
from craken.disk.transfer import OpenFile

Verb = Literal["write", "read"]

PLAIN_CALL_BYTES = 16 << 20
_REQUEST_BYTES = 64 << 20  # as large as offload's, so that a request's begin and end count as they do there
_NUM_IN_FLIGHT = 2  # requests, as with two buffers
_NUM_PARTS = 5
_LIMIT_S = 1.0  # for one verb on one part: a slow disk is known by then
_GOOD_ENOUGH = 0.95


class Speed(NamedTuple):
    """Bytes per second by verb; under `settings`, or in the plain loop when there are none."""

    settings: IoSettings | None
    bytes_per_s: dict[Verb, float]

    @property
    def s_per_byte(self) -> float:
        """Return the time for one byte each way, which is what a step of offload costs."""
        return sum(1 / speed for speed in self.bytes_per_s.values())


class Measured(NamedTuple):
    """The plain loop, and every setting in the order tried."""

    plain: Speed
    speeds: list[Speed]
    is_direct: bool


class _Part(NamedTuple):
    """A range of the file, and memory for requests of at most its size."""

    begin: int
    end: int
    buffer: Tensor


def settings_to_try(block_bytes: int | None, queue_depth: int | None, num_threads: int | None) -> list[IoSettings]:
    """Return a small grid; what is given stays fixed."""
    blocks = [block_bytes or IoSettings.block_bytes]
    depths = [queue_depth] if queue_depth else [1, 8, 32]
    threads = [num_threads] if num_threads else [1, 2, 4, 8]
    return [IoSettings(*chosen) for chosen in itertools.product(blocks, depths, threads)]


def measure(
    folder: Path,
    num_bytes: int,
    settings: Sequence[IoSettings],
    verbs: Sequence[Verb],
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Measured:
    """Move `num_bytes` in `folder` each way under every setting, less on a slow disk; OSError when it cannot."""
    is_direct = check_folder(folder)
    check_room(folder, num_bytes)
    size = round_up(num_bytes)
    file = create_file(folder, "measure", size, is_direct=is_direct)
    part_bytes = round_up(-(-size // _NUM_PARTS))
    request_bytes = max(_REQUEST_BYTES, *(one.piece_bytes * one.num_threads for one in settings))
    buffer = _random_pages(min(part_bytes, request_bytes))
    _write_once(file, size, buffer)
    candidates: list[IoSettings | None] = [None, *settings]
    found: dict[tuple[int, Verb], list[float]] = {key: [] for key in itertools.product(range(len(candidates)), verbs)}
    for begin in progress(range(0, size, part_bytes)):
        part = _Part(begin, min(begin + part_bytes, size), buffer)
        for (number, verb), speeds in found.items():
            speeds.append(_speed_of(file, part, candidates[number], verb))
    plain, *rest = (
        Speed(one, {verb: statistics.median(found[number, verb]) for verb in verbs})
        for number, one in enumerate(candidates)
    )
    return Measured(plain, rest, is_direct)


def cheapest_good_one(speeds: Sequence[Speed]) -> Speed:
    """Return the setting with the fewest threads, then the least in flight, among those within 5 % of the fastest."""
    limit = min(speed.s_per_byte for speed in speeds) / _GOOD_ENOUGH
    return min((speed for speed in speeds if speed.s_per_byte <= limit), key=_cost)


def _cost(speed: Speed) -> tuple[int, int]:
    assert speed.settings is not None
    return speed.settings.num_threads, speed.settings.piece_bytes


def _speed_of(file: OpenFile, part: _Part, settings: IoSettings | None, verb: Verb) -> float:
    if settings is None:
        return _timed(_plain_calls(file, part, verb))
    mover = Mover(settings)
    speed = _timed(_requests(SwapFile("measure", part.end, file, mover), part, verb))
    mover.close()
    return speed


def _requests(file: SwapFile, part: _Part, verb: Verb) -> Iterator[int]:
    """Yield the bytes of each request as it ends; what is in flight when the caller has seen enough is waited for."""
    start, in_flight = (file.write if verb == "write" else file.read), deque[tuple[Ticket, int]]()
    try:
        for offset in range(part.begin, part.end, part.buffer.numel()):
            memory = part.buffer[: part.end - offset]
            in_flight.append((start(memory, offset), memory.numel()))
            if len(in_flight) == _NUM_IN_FLIGHT:
                yield _ended(*in_flight.popleft())
        while in_flight:
            yield _ended(*in_flight.popleft())
    finally:
        for ticket, _ in in_flight:
            ticket.wait()


def _ended(ticket: Ticket, num_bytes: int) -> int:
    ticket.wait()
    return num_bytes


def _plain_calls(file: OpenFile, part: _Part, verb: Verb) -> Iterator[int]:
    """Yield the bytes of one call after another, all in this thread."""
    move, memory = (os.pwritev if verb == "write" else os.preadv), part.buffer.numpy().data
    for offset in range(part.begin, part.end, PLAIN_CALL_BYTES):
        yield move(file.fd, [memory[: min(PLAIN_CALL_BYTES, part.end - offset)]], offset)


def _timed(steps: Iterator[int]) -> float:
    """Return bytes per second of `steps`, as many of them as the time limit allows."""
    begin_s, moved = time.perf_counter(), 0
    for num_bytes in steps:
        moved += num_bytes
        if time.perf_counter() - begin_s > _LIMIT_S:
            break
    return moved / (time.perf_counter() - begin_s)


def _write_once(file: OpenFile, size: int, buffer: Tensor) -> None:
    """Fill the file: what was never written is read from no disk."""
    memory = buffer.numpy().data
    for offset in range(0, size, len(memory)):
        os.pwritev(file.fd, [memory[: size - offset]], offset)


def _random_pages(num_bytes: int) -> Tensor:
    """Return memory that no disk can squeeze."""
    memory = pages(num_bytes)
    memory.view(torch.int64).random_()
    return memory
