"""One cell of the parity matrix, and what a run of it yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tests.parity.model import Traits

LEARNING_RATE, DECAY = 3e-3, 0.01
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """The settings both the plain loop and the engine follow. `clip` 0 means no clipping."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    world_size: int = 2
    accumulation: int = 1
    clip: float = 0.0
    steps: int = 20
    traits: Traits = field(default_factory=Traits)
    loss_scale: float = 1.0
    device: str = "cpu"
    persistent: int = 0  # elements up to which a parameter stays whole at stage 3

    def config(self, stage: int) -> dict[str, Any]:
        """Return the engine's config. Small buckets: the tiny model then has several shard groups."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self.accumulation,
            "steps_per_print": 10**9,
            "gradient_clipping": self.clip,  # absent, it is 1.0
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": DECAY}},
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": 2000,
                "allgather_bucket_size": 2000,
                "stage3_param_persistence_threshold": self.persistent,
            },
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        if self.dtype == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": self.loss_scale}
        return config


@dataclass
class Run:
    """Loss and gradient norm of each step, and the weights at the end, by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
