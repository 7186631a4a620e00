"""A file of fixed size that flat tensors are written to and read from, and that can be looked at as a tensor."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from craken.disk.mover import Mover, Request, Ticket
from craken.disk.settings import round_down
from craken.disk.transfer import OpenFile


class SwapFile:
    """`num_bytes` on a disk, made by `Swap.file`; reads and writes are asynchronous and unordered among each other."""

    def __init__(self, name: str, num_bytes: int, file: OpenFile, mover: Mover) -> None:
        self.name = name
        self.num_bytes = num_bytes
        self._file: OpenFile | None = file
        self._mover = mover

    def read(self, into: Tensor, offset: int = 0) -> Ticket:
        """Start to fill `into` with the bytes from `offset` on; it is the disk's until the ticket has been waited for.

        `into` is contiguous and on the host. Pages move without a copy where tensor and `offset` are aligned alike
        (`pages` are), the rest through an aligned block.
        """
        return self._request("read", into, offset, self._mover.read)

    def write(self, source: Tensor, offset: int = 0) -> Ticket:
        """Start to write the bytes of `source` from `offset` on; it must not change while it is on its way."""
        return self._request("write", source, offset, self._mover.write)

    def mapped(self, dtype: torch.dtype, numel: int, offset: int = 0) -> Tensor:  # [numel]
        """Return the bytes from `offset` on as a tensor that takes no memory of its own.

        Touching it reads through the page cache and writes go back to the file, both seen by requests that start
        later; use it while no request is on its way. It stays good after the file is closed. A disk that fails under
        it ends the process (SIGBUS), as with every mapping.
        """
        num_bytes = numel * dtype.itemsize
        file = self._checked("map", num_bytes, offset)
        if offset % dtype.itemsize:
            raise ValueError(f"offset {offset} in {self.name!r}: expected a multiple of {dtype.itemsize} for {dtype}")
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        first = round_down(offset, mmap.ALLOCATIONGRANULARITY)
        mapping = mmap.mmap(file.fd, offset - first + num_bytes, offset=first)
        return torch.frombuffer(mapping, dtype=dtype, count=numel, offset=offset - first)

    @property
    def is_closed(self) -> bool:
        return self._file is None

    def close(self) -> None:
        """Give the space back, as soon as requests in flight have ended and no mapping is left."""
        self._file = None

    def _request(self, verb: str, tensor: Tensor, offset: int, start: Callable[[Request], Ticket]) -> Ticket:
        memory = _bytes_of(tensor)
        file = self._checked(verb, len(memory), offset)
        name = f"{verb} of {len(memory):,} bytes at {offset:,} of swap file {self.name!r}"
        return start(Request(file, offset, memory, tensor.data_ptr(), name))

    def _checked(self, verb: str, num_bytes: int, offset: int) -> OpenFile:
        if self._file is None:
            raise RuntimeError(f"swap file {self.name!r} is closed: {verb} before close(), or make a new one")
        if offset < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(
                f"{verb} of {num_bytes:,} bytes at {offset:,}: swap file {self.name!r} has {self.num_bytes:,} bytes"
            )
        return self._file


def _bytes_of(tensor: Tensor) -> memoryview:
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor on the host, got {tuple(tensor.shape)} on {tensor.device} with strides "
            f"{tensor.stride()}; copy it first"
        )
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
