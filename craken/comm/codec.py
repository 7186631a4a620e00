"""Numbers that travel as small integers: blocks of elements share one scale (ZeRO++, arXiv 2306.10209).

    values   |---- 256 elements ----|---- 256 ----|-- the rest --|
    message  | codes: 8 or 4 bits an element ... | scales: one fp32 a block |        uint8 [num_bytes(n)]

A block's scale is its largest magnitude over the largest code, so a value comes back within half a scale of what it
was (and is then rounded to the dtype it lands in), zero as zero. A block with an inf or nan comes back as nan
throughout: an overflow is seen as one. All rows of a matrix are done at once, in pieces that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256  # elements
_CACHED_NUMEL = 1 << 16  # elements at a time on the host: 256 KiB in fp32
_DEVICE_NUMEL = 1 << 24  # elements at a time on an accelerator: 64 MiB of scratch in fp32
_ALIGN = 16  # bytes: scales begin where fp32 may


@dataclass(frozen=True)
class Codec:
    """Symmetric quantisation to `bits` (8 or 4) an element, with a scale every 256 elements."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"expected 4 or 8 bits an element, got {self.bits}")

    @property
    def largest_code(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def num_bytes(self, numel: int) -> int:
        """Return the bytes of the message that carries `numel` elements."""
        return self._code_bytes(numel) + 4 * _num_blocks(numel)

    def quantise(self, values: Tensor, messages: Tensor) -> None:
        """Write each row of `values` [rows, n], of any float dtype, into its row of `messages` [rows, num_bytes(n)]."""
        codes, scales = self._fields(messages, values.shape[1])
        for first, last in _pieces(values):
            part = codes[:, first * self.bits // 8 : -(-last * self.bits // 8)]
            self._quantise_piece(values[:, first:last], part, scales[:, first // BLOCK : _num_blocks(last)])

    def dequantise(self, messages: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Write (or with `add`, add) what `messages` [rows, num_bytes(n)] carry into `out` [rows, n]."""
        codes, scales = self._fields(messages, out.shape[1])
        for first, last in _pieces(out):
            part = codes[:, first * self.bits // 8 : -(-last * self.bits // 8)]
            values = self._values_of(part, scales[:, first // BLOCK : _num_blocks(last)])[:, : last - first]
            if add:
                out[:, first:last].add_(values)
            else:
                out[:, first:last].copy_(values)

    def _quantise_piece(self, values: Tensor, codes: Tensor, scales: Tensor) -> None:
        blocks = _in_blocks(values)  # [rows, blocks, BLOCK]
        # by a tensor: division by a number is multiplication by its inverse on CUDA, and not on the host
        scale = blocks.abs().amax(-1).div_(blocks.new_full((), self.largest_code))
        scales.copy_(torch.where(scale.isfinite(), scale, torch.nan))
        divisor = torch.where(scale > 0, scale, 1.0).unsqueeze(-1)  # of zeros: anything
        # clamped, as a scale below 1e-38 is rounded itself
        whole = blocks.div_(divisor).round_().clamp_(-self.largest_code, self.largest_code)
        codes.copy_(self._packed(whole)[:, : codes.shape[1]])

    def _values_of(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return fp32 [rows, elements of all blocks]."""
        numel = scales.shape[1] * BLOCK
        values = codes.new_zeros((codes.shape[0], numel), dtype=torch.float32)
        unpacked = self._unpacked(codes)
        values[:, : unpacked.shape[1]].copy_(unpacked)
        values.view(*scales.shape, BLOCK).mul_(scales.unsqueeze(-1))
        return values

    def _packed(self, whole: Tensor) -> Tensor:
        """Return uint8 [rows, bytes] for whole numbers in fp32 [rows, blocks, BLOCK]."""
        rows = whole.shape[0]
        narrow = whole.to(torch.int8).view(rows, -1)
        if self.bits == 8:
            return narrow.view(torch.uint8)
        pairs = narrow.view(torch.int16)  # two elements: low byte first
        return ((pairs & 0xF) | ((pairs >> 4) & 0xF0)).to(torch.uint8)

    def _unpacked(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes.view(torch.int8)
        wide = codes.to(torch.int16)
        nibbles = ((wide & 0xF) | ((wide & 0xF0) << 4)).view(torch.int8)
        return (nibbles << 4) >> 4  # the sign of four bits

    def _code_bytes(self, numel: int) -> int:
        return -(-numel * self.bits // (8 * _ALIGN)) * _ALIGN

    def _fields(self, messages: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Return the two parts of messages: codes uint8 [rows, bytes], scales fp32 [rows, blocks]; both are views."""
        expected = self.num_bytes(numel)
        if messages.dtype != torch.uint8 or messages.shape[1] != expected:
            raise ValueError(
                f"messages of {numel} elements at {self.bits} bits: expected uint8 [rows, {expected}], got "
                f"{messages.dtype} {list(messages.shape)}"
            )
        num_codes = -(-numel * self.bits // 8)
        return messages[:, :num_codes], messages[:, self._code_bytes(numel) :].view(torch.float32)


def _num_blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def _pieces(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Yield ranges of columns [first, last) that begin at block borders."""
    most = _CACHED_NUMEL if rows.device.type == "cpu" else _DEVICE_NUMEL
    width = max(1, most // (max(1, rows.shape[0]) * BLOCK)) * BLOCK
    for first in range(0, rows.shape[1], width):
        yield first, min(first + width, rows.shape[1])


def _in_blocks(values: Tensor) -> Tensor:
    """Return a copy in fp32 [rows, blocks, BLOCK], with zeros behind the end."""
    rows, numel = values.shape
    num_blocks = _num_blocks(numel)
    blocks = values.new_empty((rows, num_blocks * BLOCK), dtype=torch.float32)
    blocks[:, :numel].copy_(values)
    blocks[:, numel:].zero_()
    return blocks.view(rows, num_blocks, BLOCK)
