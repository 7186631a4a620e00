"""Reads a checkpoint by ranges: only the blocks that hold what is asked for, each checked on its way in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from craken.checkpoint import folder as folders
from craken.checkpoint.blocks import read_block, size_problem
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

_NUM_THREADS = 4  # overlap reading with checking; 1.3 x one thread on a cold 256 MB


class Reader:
    """One checkpoint, open for reading by any number of ranks in any topology.

    `tag=None` takes the one that `latest` names. Opening reads the index and looks at the size of each file, no more.
    CheckpointNotFound (a FileNotFoundError) lists the tags that exist; CheckpointDamaged (a ValueError) names the file
    and the tensor; ValueError for an index of a newer format.
    """

    def __init__(self, folder: str | os.PathLike[str], tag: str | None = None) -> None:
        self.tag, path = folders.find(place_of(folder), tag)
        self.path = reading_ahead(path)
        self._index = read_index(self.path)
        for file in self._index.files:
            problem = size_problem(self.path, file)
            if problem is not None:
                raise CheckpointDamaged(f"{self.path / file.name} {problem}{self._victims(file.name)}")

    @property
    def world_size(self) -> int:
        """The number of ranks that saved."""
        return self._index.world_size

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

    def read(self, kind: str, spec: ShardSpec, out: Tensor) -> None:
        """Fill `out` (contiguous, `spec.numel` elements, any device) with the range that `spec` names.

        ValueError when `out` or `spec` does not fit what is stored (nothing is converted); CheckpointDamaged, with
        `out` in an undefined state, when a block cannot be read or its checksum does not fit.
        """
        record = self._record(kind, spec.fqn)
        _check_fits(record, spec, out)
        itemsize = out.dtype.itemsize
        block_bytes = self._index.block_bytes
        with record_function(f"craken::checkpoint::read ({kind} {spec.fqn})"):
            reads = plan_reads(record, spec.offset, spec.numel, itemsize=itemsize, block_bytes=block_bytes)
            with _open_all(self.path, reads) as files:
                _run_all([_job(self.path, files[read.file], read, out, record) for read in reads])

    def read_full(self, kind: str, fqn: str) -> Tensor:
        """Return a whole tensor, new, on the CPU."""
        shape = self.shape(kind, fqn)
        out = torch.empty(shape, dtype=self.dtype(kind, fqn), device="cpu")
        self.read(kind, ShardSpec(fqn, shape, 0, out.numel()), out)
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


def _job(path: Place, file: OpenFile, read: BlockRead, out: Tensor, record: TensorRecord) -> Callable[[], None]:
    def run() -> None:
        target = bytes_of(out)[read.into : read.into + read.take]  # [take]
        if read.is_whole and in_host_memory(out):
            read_block(path, file, read, memory_of(target), record)
            return
        scratch = torch.empty(read.num_bytes, dtype=torch.uint8, device="cpu")
        read_block(path, file, read, memory_of(scratch), record)
        target.copy_(scratch[read.skip : read.skip + read.take])

    return run


def _run_all(jobs: list[Callable[[], None]]) -> None:
    if len(jobs) <= 1:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


@contextmanager
def _open_all(folder: Place, reads: list[BlockRead]) -> Iterator[dict[str, OpenFile]]:
    with ExitStack() as stack:
        files: dict[str, OpenFile] = {}
        for name in dict.fromkeys(read.file for read in reads):
            try:
                files[name] = stack.enter_context(closing(open_file(folder / name)))
            except FileNotFoundError as error:
                raise CheckpointDamaged(f"{folder / name} is missing; load another tag") from error
        yield files
