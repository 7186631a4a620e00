"""Builds modules in one dtype on one device, for instance on `meta`, where weights have shapes and take no memory."""

from __future__ import annotations

from types import TracebackType

import torch


class OnDevice:
    """Have tensors that are made inside, without a dtype or device of their own, be `dtype` (floating) on `device`."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        if enabled and not dtype.is_floating_point:
            raise ValueError(f"OnDevice(dtype): expected a floating dtype, got {dtype}")
        self._dtype, self._device, self._enabled = dtype, torch.device(device), enabled

    def __enter__(self) -> None:
        if self._enabled:
            self._dtype_before = torch.get_default_dtype()
            torch.set_default_dtype(self._dtype)
            self._device.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if self._enabled:
            self._device.__exit__(kind, error, frames)
            torch.set_default_dtype(self._dtype_before)
