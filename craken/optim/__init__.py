"""Optimizers and learning-rate schedules."""

from craken.optim.build import build_optimizer
from craken.optim.cycles import LRRangeTest, OneCycle
from craken.optim.deepspeed_names import (
    DeepSpeedCPUAdagrad,
    DeepSpeedCPUAdam,
    DeepSpeedCPULion,
    FusedAdam,
    FusedLamb,
    FusedLion,
)
from craken.optim.fused import fuse_where_open, takes_grad_scale, unfuse_where_missing
from craken.optim.lamb import Lamb
from craken.optim.layouts import Layout, can_step_in_chunks, param_layouts
from craken.optim.lion import Lion
from craken.optim.muon import Muon
from craken.optim.probe import state_dtypes
from craken.optim.schedules import VALID_LR_SCHEDULES, build_scheduler
from craken.optim.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

__all__ = [
    "VALID_LR_SCHEDULES",
    "DeepSpeedCPUAdagrad",
    "DeepSpeedCPUAdam",
    "DeepSpeedCPULion",
    "FusedAdam",
    "FusedLamb",
    "FusedLion",
    "LRRangeTest",
    "Lamb",
    "Layout",
    "Lion",
    "Muon",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "build_optimizer",
    "build_scheduler",
    "can_step_in_chunks",
    "fuse_where_open",
    "param_layouts",
    "state_dtypes",
    "takes_grad_scale",
    "unfuse_where_missing",
]
