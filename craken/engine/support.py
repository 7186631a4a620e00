"""What this version does not do yet, refused by name before anything is built."""

from __future__ import annotations

from typing import Any

from craken.comm import Accelerator
from craken.config import Config
from craken.zero import policy_for_stage


def check_supported(config: Config, accelerator: Accelerator, *, mpu: Any, mesh_param: Any) -> None:
    """Raise NotImplementedError for settings and arguments that are understood but not built yet."""
    zero = config.zero_optimization
    policy_for_stage(zero.stage)
    gaps = {
        "sequence_parallel_size above 1": (config.sequence_parallel_size > 1, "leave it out"),
        "initialize(mpu=...)": (mpu is not None, "leave it out"),
        "initialize(mesh_param=...)": (mesh_param is not None, "leave it out"),
    }
    for what, (is_asked, instead) in gaps.items():
        if is_asked:
            raise NotImplementedError(f"{what} does not work yet: {instead}")
    if config.bf16.enabled and not accelerator.is_bf16_supported():
        raise ValueError("bf16.enabled is true, but this device has no bf16; set fp16.enabled or neither")
