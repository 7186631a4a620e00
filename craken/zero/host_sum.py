"""A group's summed gradient where the optimizer's states have left the device: on the host, until the step.

    device   | sum 1 of the shard |         | sum 2 |
    down               | norms, copy |   | sum 1 back |  + | norms, copy |
    host                             | 1 |                               | 1 + 2 |  update, weights on their way back

The memory stays. Between an update and the next sum it is lent to the weights, which leave through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from craken.zero.memory.link import Arrival, Link
from craken.zero.norms import piece_norms


class HostSum:
    """Host memory for a sum of [numel], and what is on its way between it and the device."""

    def __init__(self, link: Link, numel: int, *, pins: bool) -> None:
        self._link, self._numel, self._pins = link, numel, pins
        self._memory: Tensor | None = None
        self._wide: Tensor | None = None
        self._arrival = Arrival()
        self._norms: Sequence[Tensor] = ()

    def send(self, shard: Tensor, *, adds: bool) -> None:
        """Start to copy a sum to the host, with `adds` on top of what is there; `shard` may be let go of."""
        memory = self._memory_for(shard.dtype)
        with self._link.beside("down", shard):
            if adds:
                shard.add_(memory.to(shard.device, non_blocking=True))
            self._norms = piece_norms(shard)
            memory.copy_(shard, non_blocking=True)
            self._arrival = self._link.mark()

    def bring(self, shard: Tensor) -> None:
        """Start to copy the sum so far back to the device, for more to be added; `wait` before using it."""
        with self._link.beside("down", shard):
            shard.copy_(self._memory_for(shard.dtype), non_blocking=True)
            self._arrival = self._link.mark()

    def wait(self) -> None:
        """Have the current stream wait for what is on its way."""
        self._arrival.wait()

    @property
    def values(self) -> Tensor:
        """The sum [numel], once it is there for the host to read."""
        assert self._memory is not None, "no sum has been sent"
        self._arrival.wait_on_host()
        return self._memory

    def norms(self) -> Sequence[Tensor]:
        """Return the L2 norms of the sum's pieces, on the device."""
        self._arrival.wait()
        return self._norms

    def changed(self) -> None:
        """Take the norms anew: somebody has written to `values`."""
        self._norms = [norm.to(self._link.device) for norm in piece_norms(self.values)]

    def fill(self, values: Tensor) -> None:
        """Take a sum [numel] from elsewhere in place of what is here."""
        self._memory_for(values.dtype)
        self.values.copy_(values)
        self.changed()

    def convert(self, dtype: torch.dtype) -> None:
        """Hold what has been summed so far in another dtype."""
        values, self._memory = self.values, None
        self._memory_for(dtype).copy_(values)

    def lend(self, dtype: torch.dtype, sum_dtype: torch.dtype) -> Tensor:
        """Return memory [numel] in `dtype` that the device can read, until the next sum, in `sum_dtype`, is sent."""
        if dtype.itemsize > sum_dtype.itemsize:  # sums are narrower than weights only if a config says so
            if self._wide is None:
                self._wide = self._link.empty(self._numel, dtype, pins=self._pins)
            return self._wide
        return self._memory_for(sum_dtype).view(torch.uint8)[: self._numel * dtype.itemsize].view(dtype)

    @property
    def memory(self) -> list[Tensor]:
        """What is held now."""
        return [memory for memory in (self._memory, self._wide) if memory is not None]

    def _memory_for(self, dtype: torch.dtype) -> Tensor:
        if self._memory is None or self._memory.dtype != dtype:
            self._memory = self._link.empty(self._numel, dtype, pins=self._pins)
        return self._memory
