"""Tensors that are made range by range when somebody writes them: read, cast, merged or quantised on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of `shape` and `dtype` whose elements come from `read(low, high)`: flat, on the CPU, [high - low].

    Ranges begin at multiples of `unit` elements and end at one or at the tensor's end: what must stay together (a row,
    a block with one scale). `chunk_numel` bounds a range; a row longer than that comes alone.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    unit: int = 1

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel() * self.dtype.itemsize

    @property
    def chunk_numel(self) -> int:
        """How many elements are made at once, in whole units: `CHUNK_BYTES` of fp32."""
        return max(CHUNK_BYTES // 4 // self.unit, 1) * self.unit

    def chunks(self) -> Iterator[Tensor]:
        """Yield the elements in order, flat, a bounded part at a time."""
        for low in range(0, self.numel(), self.chunk_numel):
            yield self.read(low, min(low + self.chunk_numel, self.numel()))

    def contiguous(self) -> Tensor:
        """Return the whole tensor, new, on the CPU."""
        whole = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        flat, low = whole.view(-1), 0
        for chunk in self.chunks():
            flat[low : low + chunk.numel()] = chunk
            low += chunk.numel()
        return whole


def of_tensor(tensor: Tensor) -> LazyTensor:
    """Return a tensor that is there already as a lazy one."""
    flat = tensor.reshape(-1)
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda low, high: flat[low:high])


def cast(name: str, source: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Return `source` in `dtype`; reading raises ValueError naming a value that would become infinite."""
    if source.dtype == dtype:
        return source
    largest = torch.finfo(dtype).max

    def read(low: int, high: int) -> Tensor:
        values = source.read(low, high)
        converted = values.to(dtype)
        if not torch.isfinite(converted).all():
            lost = values[torch.isinf(converted) & torch.isfinite(values)]
            if lost.numel():
                raise ValueError(
                    f"{name} holds {lost[0].item():.4g}, {dtype} ends at {largest:.4g}: it would become infinite; "
                    "export as bf16 or fp32"
                )
        return converted

    return LazyTensor(source.shape, dtype, read, source.unit)
