"""The unit that is read and checked: a block of a piece, with its checksum."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import pairwise
from typing import NamedTuple

import xxhash

from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.index import FileRecord, TensorRecord
from craken.checkpoint.place import OpenFile, Place, num_bytes_of
from craken.checkpoint.read_plan import BlockRead
from craken.disk import round_up

BLOCK_BYTES = 8 << 20


def checksum_of(data: memoryview) -> str:
    """Return the checksum of a block: xxh3_64, 16 hex digits."""
    return str(xxhash.xxh3_64_hexdigest(data))


def size_problem(folder: Place, file: FileRecord) -> str | None:
    """Say what is wrong with the presence or the size of a file; None when nothing is."""
    try:
        num_bytes = num_bytes_of(folder / file.name)
    except FileNotFoundError:
        return "is missing"
    if num_bytes != file.num_bytes:
        return f"has {num_bytes} bytes, expected {file.num_bytes}: it was cut short or changed"
    return None


class ComingBlock(NamedTuple):
    """A block on its way: its parts in order, each memory and what tells that it is full; how errors call the block."""

    parts: list[tuple[memoryview, Future[None]]]
    checksum: str
    where: str

    def check(self) -> None:
        """Return once the block is there and its checksum fits; CheckpointDamaged naming the file and the tensor."""
        hasher = xxhash.xxh3_64()
        try:
            for memory, filled in self.parts:
                filled.result()
                hasher.update(memory)  # while the next ones come
        except (OSError, EOFError) as error:
            raise CheckpointDamaged(f"{self.where} cannot be read ({error}); load another tag") from error
        finally:
            self.settle()
        found = hasher.hexdigest()
        if found != self.checksum:
            raise CheckpointDamaged(
                f"{self.where} are damaged: checksum {found}, expected {self.checksum}; load another tag"
            )

    def settle(self) -> None:
        """Return once nothing is written into the block's memory any more."""
        for _, filled in self.parts:
            filled.cancel()
        wait([filled for _, filled in self.parts])


Submit = Callable[[Callable[[OpenFile, memoryview, int], None], OpenFile, memoryview, int], Future[None]]


def at_once(
    work: Callable[[OpenFile, memoryview, int], None], file: OpenFile, into: memoryview, start: int
) -> Future[None]:
    """Do in this thread what a pool's `submit` has a thread of its own do."""
    done: Future[None] = Future()
    try:
        work(file, into, start)
    except (OSError, EOFError) as error:
        done.set_exception(error)
    else:
        done.set_result(None)
    return done


def begin_block(
    path: Place, file: OpenFile, read: BlockRead, into: memoryview, record: TensorRecord, submit: Submit
) -> ComingBlock:
    """Start to read a whole block into `into` ([read.num_bytes]), which is the block's until it has been checked."""
    where = f"{path / read.file}: {record.kind} of {record.fqn}, bytes [{read.start}, {read.start + read.num_bytes})"
    num_parts = max(read.num_bytes // file.part_bytes, 1)
    inner = [round_up(read.start) + i * file.part_bytes for i in range(1, num_parts)]  # at whole pages of the file
    cuts = [read.start, *inner, read.start + read.num_bytes]
    memories = [into[low - read.start : high - read.start] for low, high in pairwise(cuts)]
    filled = [submit(_fill, file, memory, low) for low, memory in zip(cuts, memories, strict=False)]
    return ComingBlock(list(zip(memories, filled, strict=True)), read.checksum, where)


def _fill(file: OpenFile, into: memoryview, start: int) -> None:
    while len(into):
        got = file.read_into(into, start)
        if got == 0:
            raise EOFError(f"the file ends after {start} bytes")
        into, start = into[got:], start + got
