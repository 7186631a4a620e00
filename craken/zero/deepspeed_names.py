"""Closed sets under the names by which DeepSpeed's users import them; their values are what configs and calls take."""

from __future__ import annotations

from enum import Enum


class ZeroStageEnum(int, Enum):
    """The ZeRO stages, by what is sharded last."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3


class OffloadDeviceEnum(str, Enum):
    """Where states or weights rest."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    """What `engine.offload_states(include=...)` moves."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"
