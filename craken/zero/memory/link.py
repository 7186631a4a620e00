"""Copies between the device and the host's memory, on streams of their own, beside the computation.

    compute stream   | backward ......... | ......... |   next forward
    down             |   grad   grad  grad|                              gradients leave as they are summed
    host             |                    | update | update | update |
    up               |                    |     weights  weights weights  each group's weights return behind its update

On the host both are one memory: copies are plain and done at once. Memory that copies touch is page-locked if asked, or
else the driver stages them through memory of its own and the host waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from craken.disk import pages
from craken.zero.memory.room import room_for


class Arrival:
    """The end of a copy."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def wait(self) -> None:
        """Have the current stream wait; on the host the data are there already."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def wait_on_host(self) -> None:
        """Return once the data are there, for the host to read or for memory to be used again."""
        if self._event is not None:
            self._event.synchronize()


class Link:
    """The way between one device and the host."""

    def __init__(self, device: torch.device, *, host_is_device: bool | None = None) -> None:
        """host_is_device: whether both are one memory; default, on a CPU they are."""
        self.device = device
        self.host_is_device = device.type == "cpu" if host_is_device is None else host_is_device
        self._streams: dict[str, torch.cuda.Stream] = {}

    def empty(self, numel: int, dtype: torch.dtype, *, pins: bool) -> Tensor:
        """Return host memory [numel] that stays for long, page-locked if asked: for copies to and from the device."""
        if pins and numel and self.device.type == "cuda":
            return pages(numel * dtype.itemsize, pinned=True)[: numel * dtype.itemsize].view(dtype)
        return room_for(numel, dtype, torch.device("cpu")).flat

    @contextlib.contextmanager
    def beside(self, way: str, *buffers: Tensor) -> Iterator[None]:
        """Queue what the block does on the stream of `way`, behind everything queued so far on the current one.

        buffers: device memory of the current stream that the block uses, which may be let go of afterwards.
        """
        if self.device.type != "cuda":
            yield
            return
        if way not in self._streams:
            self._streams[way] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream = self._streams[way]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        for buffer in buffers:
            buffer.record_stream(stream)
        with torch.cuda.stream(stream):
            yield

    def mark(self) -> Arrival:
        """Return the arrival of all that is queued on the current stream."""
        if self.device.type != "cuda":
            return Arrival()
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return Arrival(event)
