"""Sections that name the optimizer and the learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from craken.config.section import Section
from craken.config.values import (
    Count,
    Flag,
    Fraction,
    Mismatch,
    Object,
    PositiveCount,
    Rate,
    Text,
    choice,
    number,
    per_group,
    whole,
)

Rates = Annotated[Any, per_group(number(0))]
Fractions = Annotated[Any, per_group(number(0, 1))]
LastBatch = Annotated[int, whole(-1)]
WarmupType = Annotated[str, choice("log", "linear")]


def _betas(value: Any) -> tuple[float, ...]:
    expected = "a list of numbers, each >= 0 and < 1, such as [0.9, 0.999]"
    if not isinstance(value, (list, tuple)):
        raise Mismatch(expected)
    for beta in value:
        if not isinstance(beta, (int, float)) or isinstance(beta, bool) or not 0 <= beta < 1:
            raise Mismatch(expected)
    return tuple(value)


def _eps(value: Any) -> float | None:
    if value is None:  # Adafactor's first one may be left open
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < 0:
        raise Mismatch("a number >= 0", "write it without quotes" if isinstance(value, str) else "")
    return value


class Optimizer(Section):
    """An optimizer by name; `params` are its constructor's arguments."""

    type: Text
    params: Object = Field(default_factory=dict)
    legacy_fusion: Flag = False


class Scheduler(Section):
    """A learning-rate schedule by name; `params` are its constructor's arguments."""

    type: Text
    params: Object = Field(default_factory=dict)


class LRRangeTest(Section):
    """`scheduler.params` of LRRangeTest."""

    lr_range_test_min_lr: Rates = 1e-3
    lr_range_test_step_size: PositiveCount = 2000
    lr_range_test_step_rate: Rate = 1.0
    lr_range_test_staircase: Flag = False
    last_batch_iteration: LastBatch = -1


class OneCycle(Section):
    """`scheduler.params` of OneCycle."""

    cycle_min_lr: Rates = 0.0
    cycle_max_lr: Rates = 0.0
    decay_lr_rate: Rate = 0.0
    cycle_first_step_size: PositiveCount = 2000
    cycle_second_step_size: PositiveCount | None = None
    cycle_first_stair_count: Count = 0
    cycle_second_stair_count: Count | None = None
    decay_step_size: Count = 0
    cycle_momentum: Flag = True
    cycle_min_mom: Fractions = 0.8
    cycle_max_mom: Fractions = 0.9
    decay_mom_rate: Rate = 0.0
    last_batch_iteration: LastBatch = -1


class WarmupLR(Section):
    """`scheduler.params` of WarmupLR."""

    warmup_min_lr: Rates = 0.0
    warmup_max_lr: Rates | None = None
    warmup_num_steps: PositiveCount = 1000
    warmup_type: WarmupType = "log"
    last_batch_iteration: LastBatch = -1


class WarmupDecayLR(WarmupLR):
    """`scheduler.params` of WarmupDecayLR."""

    total_num_steps: Count | None = None  # 0 where a client only evaluates: no schedule is built then


class WarmupCosineLR(Section):
    """`scheduler.params` of WarmupCosineLR; the ratios are of the optimizer's own learning rate."""

    total_num_steps: Count | None = None  # 0 where a client only evaluates: no schedule is built then
    warmup_min_ratio: Fraction = 0.0
    warmup_num_steps: PositiveCount = 1000
    cos_min_ratio: Fraction = 1e-4
    warmup_type: WarmupType = "log"
    last_batch_iteration: LastBatch = -1


SCHEDULES: dict[str, type[Section]] = {
    model.__name__: model for model in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}


class OptimizerParams(Section):
    """The `optimizer.params` whose values are checked here; the optimizer itself knows the others."""

    lr: Rates = 1e-3
    weight_decay: Rates = 0.0
    betas: Annotated[Any, PlainValidator(_betas)] = (0.9, 0.999)
    eps: Annotated[Any, per_group(PlainValidator(_eps))] = 1e-8
    momentum: Fractions = 0.0
    torch_adam: Flag = False
    adam_w_mode: Flag = True
    bias_correction: Flag = True
    amsgrad: Flag = False


TORCH_SCHEDULES = [
    *(
        "LambdaLR",
        "MultiplicativeLR",
        "StepLR",
        "MultiStepLR",
        "ConstantLR",
        "LinearLR",
        "ExponentialLR",
        "PolynomialLR",
    ),
    *("CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR", "SequentialLR", "ChainedScheduler"),
    *("ReduceLROnPlateau",),
]

OPTIMIZERS = [
    *("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "SGD"),
    *("OneBitAdam", "OneBitLamb", "ZeroOneAdam", "MuAdam", "MuAdamW", "MuSGD"),
    *("FusedAdam", "CPUAdam", "DeepSpeedCPUAdam", "CPUAdagrad", "DeepSpeedCPUAdagrad", "FusedLamb"),
    *("FusedLion", "CPULion", "DeepSpeedCPULion"),
    *("ASGD", "Adadelta", "Adafactor", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop", "Rprop", "SparseAdam"),
]

OPTIMIZER_PARAMS = [
    *("foreach", "fused", "maximize", "capturable", "differentiable", "dampening", "nesterov", "lr_decay"),
    *(
        "initial_accumulator_value",
        "momentum_decay",
        "decoupled_weight_decay",
        "set_grad_none",
        "fp32_optimizer_states",
    ),
    *("muon_lr", "adam_lr", "ns_method", "ns_steps", "ns_coefficients", "adjust_lr_fn", "max_coeff", "min_coeff"),
    *("eps_inside_sqrt", "freeze_step", "cuda_aware", "comm_backend_name", "coeff_beta", "factor_max", "factor_min"),
    *("factor_threshold", "var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper", "rho"),
    *("alpha", "centered", "lambd", "t0", "etas", "step_sizes", "beta2_decay", "d", "adamw_mode", "max_grad_norm"),
]

OTHER_WORDS = {"learning_rate": "lr", "wd": "weight_decay", "epsilon": "eps", "beta1": "betas", "beta2": "betas"}
