"""Reads a checkpoint by ranges: only the blocks that hold what is asked for, each checked on its way in."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from craken.checkpoint import folder as folders
from craken.checkpoint.blocks import ComingBlock, Submit, at_once, begin_block, size_problem
from craken.checkpoint.entry import (
    RANK_STATE,
    RESERVED_KINDS,
    SHARED_STATE,
    bytes_of,
    dtype_of,
    in_host_memory,
    memory_of,
)
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.index import TensorRecord, read_index
from craken.checkpoint.place import OpenFile, Place, open_file, place_of, reading_ahead
from craken.checkpoint.read_plan import BlockRead, plan_reads
from craken.checkpoint.state_codec import decode_state
from craken.spec import ShardSpec

_NUM_THREADS = 4
_NUM_BLOCKS = 4  # on their way at a time
_NUM_FILES = 4 * _NUM_BLOCKS  # open at a time: a file of a block on its way is never the one to be closed
_SCRATCH_BYTES = 4 << 20  # in blocks of which a part is wanted, with one block more
_SMALL_BYTES = 1 << 20  # up to here waking a thread costs more than it saves


class Wish(NamedTuple):
    """A range of a tensor, and the memory for it: contiguous, `spec.numel` elements, on any device.

    is_shared: other processes of this host read the same range; it then comes through the page cache.
    """

    kind: str
    spec: ShardSpec
    out: Tensor
    is_shared: bool = False


class Reader:
    """One checkpoint, open for reading by any number of ranks in any topology.

    `tag=None` takes the one that `latest` names. Opening reads the index and looks at the size of each file, no more.
    CheckpointNotFound (a FileNotFoundError) lists the tags that exist; CheckpointDamaged (a ValueError) names the file
    and the tensor; ValueError for an index of a newer format.
    """

    def __init__(self, folder: str | os.PathLike[str], tag: str | None = None) -> None:
        self.tag, path = folders.find(place_of(folder), tag)
        self._index = read_index(path)
        self.path = reading_ahead(path, len(self._index.files))
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "craken-checkpoint-read")  # started when needed, end with it
        for file in self._index.files:
            problem = size_problem(self.path, file)
            if problem is not None:
                raise CheckpointDamaged(f"{self.path / file.name} {problem}{self._victims(file.name)}")

    @property
    def world_size(self) -> int:
        """The number of ranks that saved."""
        return self._index.world_size

    @property
    def fingerprint(self) -> str:
        """The checksum of the index, which has those of all tensors in it: equal for the same checkpoint alone."""
        return self._index.checksum

    @property
    def shared_state(self) -> Any:
        """What rank 0 gave as `shared_state`, built anew at each access."""
        return decode_state(self._index.shared_state, lambda name: self.read_full(SHARED_STATE, name))

    def shared_value(self, key: str) -> Any:
        """Return what `shared_state` has under `key`, without reading the rest; None when it has no such key."""
        encoded = self._index.shared_state.get(key)
        return decode_state(encoded, lambda name: self.read_full(SHARED_STATE, name))

    def rank_state(self, rank: int) -> Any:
        """Return what `rank` gave as its `rank_state`; ValueError when fewer ranks saved."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"{self.path} was saved by {self.world_size} ranks, so there is no state of rank {rank}")
        document = json.loads(self.read_full(RANK_STATE, str(rank)).numpy().tobytes())
        return decode_state(document, lambda name: self.read_full(RANK_STATE, f"{rank}/{name}"))

    def kinds(self) -> list[str]:
        """Return the kinds of tensors stored, states apart, in the order they were saved."""
        return [kind for kind in dict.fromkeys(kind for kind, _ in self._index.tensors) if kind not in RESERVED_KINDS]

    def names(self, kind: str) -> list[str]:
        """Return the names of the tensors of `kind`; none for a kind that was not saved."""
        return [fqn for other, fqn in self._index.tensors if other == kind]

    def shape(self, kind: str, fqn: str) -> tuple[int, ...]:
        """Return the full shape of a tensor; ValueError when there is no such tensor."""
        return self._record(kind, fqn).shape

    def dtype(self, kind: str, fqn: str) -> torch.dtype:
        """Return the dtype of a tensor; ValueError when there is no such tensor."""
        return dtype_of(self._record(kind, fqn).dtype)

    def read(self, kind: str, spec: ShardSpec, out: Tensor, *, is_shared: bool = False) -> None:
        """Fill `out` with the range that `spec` names, as `read_all` does for several."""
        self.read_all([Wish(kind, spec, out, is_shared)])

    def read_all(self, wishes: Iterable[Wish]) -> None:
        """Fill the `out` of each wish, one after another: the blocks of the next come while those of one are checked.

        Holds up to 12 MiB where an `out` is on a device or blocks reach beyond its range, else 4 MiB
        besides. ValueError when an `out` or `spec` does not fit what is stored (nothing is converted);
        CheckpointDamaged, with every `out` in an undefined state, when a block cannot be read or its checksum does not
        fit.
        """
        with record_function("craken::checkpoint::read"), closing(_Files(self.path)) as files:
            _land_in_order(self._begin(wishes, files))

    def _begin(self, wishes: Iterable[Wish], files: _Files) -> Iterator[_Arrival]:
        """Start to read what wishes need, a block at each step; what several in a row want of it comes at once."""
        wanted = (part for wish in wishes for part in self._parts(wish))
        for _, group in groupby(wanted, key=lambda part: (part.read.file, part.read.start)):
            parts = list(group)
            wish, read, record, submit = parts[0]
            in_place = len(parts) == 1 and read.is_whole and in_host_memory(wish.out)
            scratch = None if in_place else torch.empty(read.num_bytes, dtype=torch.uint8, device="cpu")
            memory = memory_of(_place_in(wish.out, read) if scratch is None else scratch)
            file = files.open(read.file, is_shared=wish.is_shared)
            yield _Arrival(begin_block(self.path, file, read, memory, record, submit), scratch, parts)

    def _parts(self, wish: Wish) -> list[_Part]:
        """Return the reads that a wish needs."""
        record, out = self._record(wish.kind, wish.spec.fqn), wish.out
        _check_fits(record, wish.spec, out)
        itemsize, block_bytes = out.dtype.itemsize, self._index.block_bytes
        reads = plan_reads(record, wish.spec.offset, wish.spec.numel, itemsize=itemsize, block_bytes=block_bytes)
        is_small = sum(read.num_bytes for read in reads) <= _SMALL_BYTES
        submit = at_once if is_small else self._threads.submit
        return [_Part(wish, read, record, submit) for read in reads]

    def read_full(self, kind: str, fqn: str) -> Tensor:
        """Return a whole tensor, new, on the CPU."""
        shape = self.shape(kind, fqn)
        out = torch.empty(shape, dtype=self.dtype(kind, fqn), device="cpu")
        self.read(kind, ShardSpec.whole(fqn, shape), out)
        return out

    def _record(self, kind: str, fqn: str) -> TensorRecord:
        record = self._index.tensors.get((kind, fqn))
        if record is None:
            others = self.names(kind)
            has = f"{len(others)} tensors of this kind, such as {others[:3]}" if others else f"the kinds {self.kinds()}"
            raise ValueError(f"{self.path} holds no {kind} of {fqn}; it has {has}")
        return record

    def _victims(self, file: str) -> str:
        tensors = self._index.tensors.values()
        held = [f"{tensor.kind} of {tensor.fqn}" for tensor in tensors for piece in tensor.pieces if piece.file == file]
        return f"; it holds {len(held)} tensors or parts of them, such as {', '.join(held[:3])}; load another tag"


def _check_fits(record: TensorRecord, spec: ShardSpec, out: Tensor) -> None:
    name = f"{record.kind} of {record.fqn}"
    if tuple(spec.global_shape) != record.shape:
        raise ValueError(f"{name}: stored with shape {record.shape}, asked for with shape {spec.global_shape}")
    if out.dtype != dtype_of(record.dtype):
        raise ValueError(f"{name}: stored as {dtype_of(record.dtype)}, asked for as {out.dtype}; read it as stored")
    if out.numel() != spec.numel or not out.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of {spec.numel} elements to read into, got shape "
            f"{tuple(out.shape)} with strides {tuple(out.stride())}"
        )


class _Part(NamedTuple):
    """What a wish needs of a block, and how the block is to be read."""

    wish: Wish
    read: BlockRead
    record: TensorRecord
    submit: Submit


class _Arrival(NamedTuple):
    """A block on its way, into its place or, where parts of it are wanted, into `scratch` [num_bytes]."""

    block: ComingBlock
    scratch: Tensor | None
    parts: list[_Part]

    def land(self) -> None:
        """Check the block, and put what is wanted of it where it belongs."""
        self.block.check()
        if self.scratch is not None:
            for wish, read, *_ in self.parts:
                _place_in(wish.out, read).copy_(self.scratch[read.skip : read.skip + read.take])


def _land_in_order(coming: Iterable[_Arrival]) -> None:
    """Check blocks in order while those behind are on their way; all memory is the callers' again on return."""
    arrivals: deque[_Arrival] = deque()
    try:
        for arrival in coming:
            arrivals.append(arrival)
            while len(arrivals) == _NUM_BLOCKS or _scratch_bytes(arrivals) > _SCRATCH_BYTES:
                arrivals.popleft().land()
        while arrivals:
            arrivals.popleft().land()
    finally:
        for arrival in arrivals:
            arrival.block.settle()


def _scratch_bytes(arrivals: Iterable[_Arrival]) -> int:
    return sum(arrival.scratch.numel() for arrival in arrivals if arrival.scratch is not None)


def _place_in(out: Tensor, read: BlockRead) -> Tensor:  # uint8 [take]
    return bytes_of(out)[read.into : read.into + read.take]


class _Files:
    """The files of a checkpoint that were asked for last, open; more of them than blocks are on their way."""

    def __init__(self, folder: Place) -> None:
        self._folder = folder
        self._open: dict[tuple[str, bool], OpenFile] = {}  # the latest last

    def open(self, name: str, *, is_shared: bool) -> OpenFile:
        """Return a file; CheckpointDamaged if it is missing."""
        key = name, is_shared
        if key not in self._open:
            if len(self._open) == _NUM_FILES:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[key] = open_file(self._folder / name, is_shared=is_shared)
            except FileNotFoundError as error:
                raise CheckpointDamaged(f"{self._folder / name} is missing; load another tag") from error
        self._open[key] = file = self._open.pop(key)
        return file

    def close(self) -> None:
        """Close what is open."""
        for file in self._open.values():
            file.close()
