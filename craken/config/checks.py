"""Checks that look at more than one key: settings that need another, or exclude each other."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from craken.config.normalise import Findings, normalise
from craken.config.problems import Problem, shown
from craken.config.schema import Config
from craken.config.sections.training import (
    OPTIMIZER_PARAMS,
    OPTIMIZERS,
    OTHER_WORDS,
    SCHEDULES,
    TORCH_SCHEDULES,
    OptimizerParams,
)
from craken.config.sections.zero import NOTHING_SHARDED, PARAMETERS_SHARDED, ZeroOptimization
from craken.config.validate import validate
from craken.config.values import nearest, plain


def check(config: Config, findings: Findings) -> None:
    """Add to `findings` every problem that lies between the keys of `config`."""
    found = [*_precision(config), *_offload(config.zero_optimization), *_reduction(config)]
    found += _hierarchy(config.zero_optimization)
    findings.problems += [problem._replace(path=findings.path(problem.path)) for problem in found]
    findings.notices += _unread(config.zero_optimization)
    _optimizer(config, findings)
    _scheduler(config, findings)


def _precision(config: Config) -> Iterator[Problem]:
    stage = config.zero_optimization.stage
    if config.fp16.enabled and config.bf16.enabled:
        yield Problem("fp16.enabled", "fp16 or bf16", "both enabled", 'set "fp16.enabled" or "bf16.enabled" to false')
    if config.fp16.enabled and config.fp16.loss_scale == 0:
        for key in ("loss_scale_window", "min_loss_scale"):
            if getattr(config.fp16, key) <= 0:
                yield Problem(
                    f"fp16.{key}",
                    "a number > 0 with a dynamic loss scale",
                    shown(getattr(config.fp16, key)),
                    'or write a fixed scale, such as "fp16.loss_scale": 128',
                )
    low_precision_masters = {
        "fp16.fp16_master_weights_and_grads": config.fp16.fp16_master_weights_and_grads,
        "bf16.bf16_master_weights_and_grads": config.bf16.bf16_master_weights_and_grads,
        "bf16.bf16_optimizer_states": config.bf16.bf16_optimizer_states,
    }
    for path, is_set in low_precision_masters.items():
        if is_set and stage == NOTHING_SHARDED:
            yield _needs_stage(path, "1, 2 or 3", stage)
    if config.bf16.bf16_optimizer_states and not config.bf16.bf16_master_weights_and_grads:
        yield Problem(
            "bf16.bf16_optimizer_states",
            '"bf16.bf16_master_weights_and_grads": true beside it',
            "false",
            "set both or neither",
        )


def _offload(zero: ZeroOptimization) -> Iterator[Problem]:
    for name in ("offload_param", "offload_optimizer"):
        offload = getattr(zero, name)
        if offload.device == "nvme" and offload.nvme_path in (None, "none"):
            remedy = 'write for example "nvme_path": "/local_nvme"'
            if offload.nvme_path == "none":  # accelerate's word: it drops what its own file says
                remedy += f", or set ACCELERATE_DEEPSPEED_{name.upper()}_NVME_PATH for accelerate launch"
            yield Problem(
                f"zero_optimization.{name}.nvme_path",
                'a folder on the disk, as "device" is "nvme"',
                "nothing" if offload.nvme_path is None else shown(offload.nvme_path),
                remedy,
            )
    if zero.offload_param.device != "none" and zero.stage < PARAMETERS_SHARDED:
        yield Problem(
            "zero_optimization.offload_param.device",
            f'"none" at stage {zero.stage}: parameters can be offloaded at stage 3 only',
            shown(zero.offload_param.device),
            'write "zero_optimization.stage": 3, or "device": "none"',
        )
    if zero.offload_optimizer.device != "none" and zero.stage < PARAMETERS_SHARDED:
        if zero.offload_optimizer.ratio < 1:
            yield _needs_stage("zero_optimization.offload_optimizer.ratio", "3", zero.stage)
        if zero.offload_optimizer.super_offload:
            yield _needs_stage("zero_optimization.offload_optimizer.super_offload", "3", zero.stage)


def _hierarchy(zero: ZeroOptimization) -> Iterator[Problem]:
    if zero.mics_shard_size <= 0:
        return
    if zero.stage < PARAMETERS_SHARDED:
        yield _needs_stage("zero_optimization.mics_shard_size", "3", zero.stage)
    if zero.zero_hpz_partition_size > 1:
        yield Problem(
            "zero_optimization.zero_hpz_partition_size",
            '1 beside "mics_shard_size", which keeps all gathers inside',
            shown(zero.zero_hpz_partition_size),
            "remove one of the two",
        )


def _unread(zero: ZeroOptimization) -> Iterator[str]:
    """Yield a notice for a setting that is not read beside the others."""
    shards_params = zero.stage == PARAMETERS_SHARDED
    if shards_params and zero.zeropp_loco_param is not None and not zero.zero_quantized_gradients:
        yield "zero_optimization.zeropp_loco_param has no effect without zero_quantized_gradients: set that to true"


def _reduction(config: Config) -> Iterator[Problem]:
    if config.gradient_allreduce_op == "sum" and config.zero_optimization.stage == PARAMETERS_SHARDED:
        yield Problem(
            "gradient_allreduce_op", '"mean" at stage 3', '"sum"', "or choose zero_optimization.stage 0, 1 or 2"
        )


def _needs_stage(path: str, stages: str, stage: int) -> Problem:
    return Problem(
        path, f"zero_optimization.stage {stages} beside it", f"stage {stage}", f"remove it or set stage {stages}"
    )


def _optimizer(config: Config, findings: Findings) -> None:
    if config.optimizer is None:
        return
    if config.optimizer.type.lower() not in [name.lower() for name in OPTIMIZERS]:  # their case is free
        _unknown_name("optimizer.type", config.optimizer.type, OPTIMIZERS, "torch.optim", findings)
    params = config.optimizer.params
    for name in params:
        if name in OTHER_WORDS:
            hint = f'did you mean "{OTHER_WORDS[name]}"?'
            findings.problems.append(Problem(f"optimizer.params.{name}", "a known name", f'"{name}"', hint))
        _near_miss(f"optimizer.params.{name}", name, [*OPTIMIZER_PARAMS, *OptimizerParams.model_fields], findings)
    checked: dict[str, Any] = {
        name: params[name] for name in OptimizerParams.model_fields if params.get(name) is not None
    }
    validate(OptimizerParams, checked, "optimizer.params", findings)
    if "max_grad_norm" in params:
        norm = shown(params["max_grad_norm"])
        findings.problems.append(
            Problem(
                "optimizer.params.max_grad_norm",
                "clipping outside the optimizer",
                norm,
                f'remove it and write "gradient_clipping": {norm} at the top level',
            )
        )


def _scheduler(config: Config, findings: Findings) -> None:
    if config.scheduler is None:
        return
    names = [*SCHEDULES, *TORCH_SCHEDULES]
    if config.scheduler.type not in names:
        _unknown_name("scheduler.type", config.scheduler.type, names, "torch.optim.lr_scheduler", findings)
    model = SCHEDULES.get(config.scheduler.type)
    if model:
        known = normalise(model, config.scheduler.params, "scheduler.params", findings)
        validate(model, known, "scheduler.params", findings)


def _unknown_name(path: str, name: str, known: list[str], module: str, findings: Findings) -> None:
    """Report a class's `name` that is neither `known` nor torch's: loads torch, which newer names may be in."""
    before = len(findings.problems)
    _near_miss(path, name, known, findings)
    if len(findings.problems) == before and name.lower() not in map(str.lower, dir(import_module(module))):
        listed = ", ".join(known[:8])
        findings.problems.append(Problem(path, f"a known name ({listed}, ...) or one of {module}", f'"{name}"'))


def _near_miss(path: str, name: str, known: list[str], findings: Findings) -> None:
    """Report `name` when it is almost one of `known`; names of torch's own that we do not list pass."""
    if name in known:
        return
    meant = nearest(name, known)
    if meant and (plain(meant) == plain(name) or get_close_matches(name, [meant], cutoff=0.8)):
        findings.problems.append(Problem(path, "a known name", f'"{name}"', f'did you mean "{meant}"?'))
