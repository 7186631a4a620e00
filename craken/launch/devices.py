"""Counts this host's accelerators, and asks torch only where there may be some."""

from __future__ import annotations

import os
from pathlib import Path

# Device nodes of NVIDIA, AMD, Intel and Ascend drivers: without any of them torch finds no accelerator either.
_DEVICE_NODES = ("nvidia0", "nvidiactl", "kfd", "dri/renderD128", "accel/accel0", "davinci0", "dxg")


def may_have_accelerators(device_folder: Path = Path("/dev")) -> bool:
    """Claim that a driver's device node exists; True where nodes are named otherwise (not Linux)."""
    return os.name != "posix" or any((device_folder / node).exists() for node in _DEVICE_NODES)


def count_accelerators() -> int:
    """Return how many accelerators torch can use here. Imports torch (1-2 s) only where a driver is present."""
    if not may_have_accelerators():
        return 0
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
