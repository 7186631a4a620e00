"""Layers that move their quantised weights out of where they were put (bitsandbytes), and what is done about it.

8-bit weights are handed to the layer's own state at its first forward and read from there ever after: they stay whole.
4-bit weights are repacked into new memory for inference on some CPUs: the layers are told not to. Where weights are
shards the new memory would be whole; at other stages what was saved, or merged with an adapter, after an evaluation
would be read in the wrong order.
"""

from __future__ import annotations

from torch import nn


def must_stay_whole(param: nn.Parameter) -> bool:
    """Say whether a layer keeps reading the memory that this parameter had at its first forward."""
    return hasattr(param, "SCB")


def keep_from_repacking(model: nn.Module) -> None:
    """Have layers leave the weights that they were given in place."""
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
