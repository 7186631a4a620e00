"""Which dtype each copy of a number has: compute, reduce, accumulate, master."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NAMES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "float": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "double": torch.float64,
    "float64": torch.float64,
}


def dtype_from_name(name: str) -> torch.dtype:
    """Return the torch dtype for a config's spelling (`fp32`, `bf16`, `fp16`, ...)."""
    if name.lower() not in _NAMES:
        raise ValueError(f"unknown dtype {name!r}; expected one of {', '.join(sorted(_NAMES))}")
    return _NAMES[name.lower()]


@dataclass(frozen=True)
class Precision:
    """The dtypes of one job.

    compute: parameters in forward and backward; None leaves the model's own dtypes alone. reduce: what gradients travel
    in; None means the parameter's dtype. accumulate: what gradients are kept in between micro-batches and until the
    step; None means the parameter's dtype. Masters are fp32, or the parameter's own dtype when that is as wide.
    """

    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None
    accumulate: torch.dtype | None = None

    def reduce_for(self, param_dtype: torch.dtype) -> torch.dtype:
        return self.reduce or param_dtype

    def accumulate_for(self, param_dtype: torch.dtype) -> torch.dtype:
        return param_dtype if self.accumulate is None or param_dtype.itemsize > 4 else self.accumulate


def master_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype the optimizer updates in: fp32 for narrower parameters."""
    return torch.float32 if param_dtype.itemsize < 4 else param_dtype
