"""Norms of flat buffers, piece by piece: one fp32 norm of 30 M elements is off by 0.17 %, pieces of 100 k by 3e-7."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_NORM_PIECE = 100_000  # elements


def piece_norms(flat: Tensor) -> Sequence[Tensor]:
    """Return the L2 norm of each piece of `flat` in fp32 or better, as scalars on its device."""
    if flat.dtype.itemsize < 4 and not flat.is_cuda:
        # the CPU's norm of 16-bit elements is five times slower than a cast that stays in the cache
        return [torch.linalg.vector_norm(piece.float()) for piece in torch.split(flat, _NORM_PIECE)]
    dtype = torch.promote_types(flat.dtype, torch.float32)
    if flat.numel() <= _NORM_PIECE:
        return [torch.linalg.vector_norm(flat, dtype=dtype)]
    return torch._foreach_norm(list(torch.split(flat, _NORM_PIECE)), 2.0, dtype)


def sum_of_squares(norms: Iterable[Sequence[Tensor]]) -> float:
    """Return the sum of squares of all norms, exactly rounded; inf or nan if any is.

    Waits for the device: the norms are all on one.
    """
    listed = [norm for of_flat in norms for norm in of_flat]
    return math.fsum(norm * norm for norm in _values(listed))


def _values(scalars: Sequence[Tensor]) -> list[float]:
    if scalars and scalars[0].is_cuda:
        return [float(value) for value in torch.stack(list(scalars)).tolist()]
    return [scalar.item() for scalar in scalars]  # a stack of one costs as much as the norm itself
