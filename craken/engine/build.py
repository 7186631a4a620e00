"""Turns a request and a config into the parts of an engine: the only reader of the whole config."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from craken.comm import Accelerator, MeshAxis
from craken.config import BatchSizes, Config, resolve_batch
from craken.engine.agreement import check_training_agrees
from craken.engine.data import ResumableLoader
from craken.engine.model import named_parameters, place_buffers, place_frozen
from craken.engine.monitor import Monitor
from craken.engine.offload import (
    check_states_can_rest,
    placement_of,
    reserve_states,
    shelf_for,
    state_swap_for,
)
from craken.engine.optimizers import cuts_of, get_optimizer, get_scheduler, members
from craken.engine.request import Request
from craken.engine.wiring import wires_for
from craken.log import warn_once
from craken.optim import can_step_in_chunks, takes_grad_scale, unfuse_where_missing
from craken.precision import DynamicLossScale, LossScale, Precision, StaticLossScale, dtype_from_name
from craken.zero import (
    CPU_GROUP_BYTES,
    CUDA_GROUP_BYTES,
    Binding,
    Budget,
    Ceilings,
    GroupRules,
    HostShare,
    LiveBudget,
    ShardedLayers,
    ShardGroup,
    ShardingPlan,
    Shelf,
    StateSwap,
    Stepping,
    Wire,
    is_castable,
    keep_freed_memory,
    mark_leaves,
    policy_for_stage,
    returning_freed_memory,
    shard_model,
    take_out,
    unwatch_attributes,
)

# What a unit of stage 3 may hold, in elements: live weights are one unit in use and one gathered ahead.
CPU_UNIT_NUMEL = 8 << 20
CUDA_UNIT_NUMEL = 512 << 20


@dataclass(frozen=True)
class Stride:
    """The numbers of a step: batch sizes, what gradients are divided by besides the loss scale, and clipping."""

    batch: BatchSizes
    divisor: float
    max_norm: float
    skips_nonfinite: bool


@dataclass(frozen=True)
class Parts:
    """Everything an engine is made of."""

    config: Config
    axis: MeshAxis
    device: torch.device
    module: nn.Module
    layers: ShardedLayers
    binding: Binding | None
    stepping: Stepping
    swap: StateSwap | None
    shelf: Shelf
    scheduler: Any
    loss_scale: LossScale
    precision: Precision
    stride: Stride
    loader: ResumableLoader[Any] | None
    monitor: Monitor

    @property
    def groups(self) -> list[ShardGroup]:
        """The groups that train."""
        return self.layers.groups


def build_parts(request: Request, config: Config, axis: MeshAxis, accelerator: Accelerator) -> Parts:
    """Collective over `axis`: build what the config asks for around the request's model."""
    batch = resolve_batch(config, axis.size)
    precision = precision_of(config, batch.accumulation_steps)
    device = accelerator.device()
    named = named_parameters(request.model)
    trainable = [(name, param) for name, param in named if param.requires_grad]
    optimizer = get_optimizer(request, config, trainable)
    scheduler = get_scheduler(request, config, optimizer)
    check_training_agrees(optimizer, scheduler, request.training_data, axis)
    loader = _loader(request, config, batch, axis)
    sharded = _sharded_params(trainable, optimizer)
    ids = {id(param) for _, param in sharded}
    check_states_can_rest(config, optimizer)
    shelf = shelf_for(config, device, axis, [param for _, param in sharded], optimizer)
    wires = wires_for(config.zero_optimization, axis, shelf)
    rules = replace(rules_of(config, batch, precision, axis), placement=placement_of(config, shelf))
    share = HostShare(config.zero_optimization.offload_optimizer.ratio)
    cuts = cuts_of(optimizer) if optimizer else {}
    plan = ShardingPlan(rules, *wires, _budget(config, wires.trained), cuts, share)
    live = _live_budget(config, wires.trained, request.model)
    # settings that are wrong have been refused: the model was as `Init` built it until here
    unwatch_attributes(request.model)
    with returning_freed_memory():
        layers = shard_model(request.model, sharded, plan, live)
    if accelerator.is_cpu:
        keep_freed_memory()
    ids |= {id(param) for group in layers.frozen for param in group.params}
    rest = [(name, param) for name, param in named if id(param) not in ids]
    take_out([param for _, param in rest])
    place_frozen(rest, dtype=precision.compute, device=device, axis=axis)
    place_buffers(request.model, device, axis)
    binding, swap = _bind(optimizer, layers.groups, config, shelf, axis)
    return Parts(
        config=config,
        axis=axis,
        device=device,
        module=request.model,
        layers=layers,
        binding=binding,
        stepping=_stepping(optimizer, config),
        swap=swap,
        shelf=shelf,
        scheduler=scheduler,
        loss_scale=loss_scale_of(config),
        precision=precision,
        stride=_stride(config, batch, axis, layers.groups),
        loader=loader,
        monitor=Monitor.of(config),
    )


def _bind(
    optimizer: Optimizer | None, groups: list[ShardGroup], config: Config, shelf: Shelf, axis: MeshAxis
) -> tuple[Binding | None, StateSwap | None]:
    """Collective where states rest in files: hand the optimizer its fragments."""
    if optimizer is None:
        return None, None
    binding = Binding(optimizer, groups)
    unfuse_where_missing(optimizer)  # the fragments may live on another device than the parameters did
    swap = state_swap_for(config, groups, binding, shelf)
    if swap is not None:
        reserve_states(swap, optimizer, axis)
    return binding, swap


def precision_of(config: Config, accumulation_steps: int) -> Precision:
    """Return the job's dtypes; several micro-batches' gradients are accumulated in fp32 unless the config says else."""
    compute = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
    named = config.data_types.grad_accum_dtype
    default = torch.float32 if accumulation_steps > 1 else None
    reduce = config.communication_data_type
    return Precision(
        compute=compute,
        reduce=dtype_from_name(reduce) if reduce else None,
        accumulate=dtype_from_name(named) if named else default,
    )


def rules_of(config: Config, batch: BatchSizes, precision: Precision, axis: MeshAxis) -> GroupRules:
    """Return what shard groups do with gradients under this config."""
    predivide = float(axis.size) if config.prescale_gradients else config.gradient_predivide_factor
    policy = policy_for_stage(config.zero_optimization.stage)
    return GroupRules(policy, precision, predivide=predivide, accumulates=batch.accumulation_steps > 1)


def loss_scale_of(config: Config) -> LossScale:
    """Return the loss scale: dynamic for fp16 with `loss_scale` 0, fixed otherwise."""
    fp16 = config.fp16
    if not fp16.enabled:
        return StaticLossScale(1.0)
    if fp16.loss_scale > 0:
        return StaticLossScale(float(fp16.loss_scale))
    return DynamicLossScale(
        value=2.0**fp16.initial_scale_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis,
        min_scale=fp16.min_loss_scale,
        consecutive_hysteresis=fp16.consecutive_hysteresis,
    )


def _sharded_params(
    trainable: list[tuple[str, nn.Parameter]], optimizer: Optimizer | None
) -> list[tuple[str, nn.Parameter]]:
    if optimizer is None:
        return []
    held = members(optimizer)
    params = [(name, param) for name, param in trainable if id(param) in held]
    for name, param in params:
        if not is_castable(param):
            raise ValueError(f"parameter {name} is trainable but of dtype {param.dtype}; expected a floating dtype")
    return params


def _stepping(optimizer: Optimizer | None, config: Config) -> Stepping:
    if optimizer is None:
        return Stepping(in_chunks=False, takes_grad_scale=False)
    return Stepping(
        in_chunks=can_step_in_chunks(optimizer),
        takes_grad_scale=takes_grad_scale(optimizer),
        max_numel=config.zero_optimization.sub_group_size,
    )


def _stride(config: Config, batch: BatchSizes, axis: MeshAxis, groups: list[ShardGroup]) -> Stride:
    predivide = groups[0].rules.predivide if groups else 1.0
    ranks = axis.size if config.gradient_allreduce_op == "mean" else 1
    skips = config.fp16.enabled or (config.bf16.enabled and config.bf16.check_grad_overflow)
    return Stride(batch, ranks / predivide, config.gradient_clipping, skips)


def _live_budget(config: Config, wire: Wire, model: nn.Module) -> LiveBudget:
    zero = config.zero_optimization
    leaf = zero.leaf_module
    mark_leaves(model, classes=leaf.classes, names=leaf.names, suffixes=leaf.name_suffixes)
    most = CPU_UNIT_NUMEL if wire.device.type == "cpu" else CUDA_UNIT_NUMEL
    return LiveBudget(
        unit_numel=min(zero.stage3_max_live_parameters, most),
        persistent_numel=zero.stage3_param_persistence_threshold,
        persistent_total=zero.stage3_model_persistence_threshold,
        small_layer_numel=zero.stage3_module_granularity_threshold,
    )


def ceilings_of(config: Config, layers: ShardedLayers) -> Ceilings:
    """Return how much may be whole at a time: by default the largest unit, and one more gathered ahead.

    The reuse distance counts only where the user set it: its default would keep every weight whole.
    """
    zero = config.zero_optimization
    largest = max(sum(group.layout.padded_numel for group in groups) for groups in layers.groups_of.values())
    reuse = zero.stage3_max_reuse_distance if "stage3_max_reuse_distance" in zero.model_fields_set else 0
    return Ceilings(min(zero.stage3_prefetch_bucket_size, largest), zero.stage3_max_live_parameters, reuse)


def _budget(config: Config, wire: Wire) -> Budget:
    num_bytes = CPU_GROUP_BYTES if wire.device.type == "cpu" else CUDA_GROUP_BYTES
    zero = config.zero_optimization
    return Budget(num_bytes, min(zero.reduce_bucket_size, zero.allgather_bucket_size))


def _loader(request: Request, config: Config, batch: BatchSizes, axis: MeshAxis) -> ResumableLoader[Any] | None:
    if request.training_data is None:
        return None
    loader: ResumableLoader[Any] = ResumableLoader(
        request.training_data,
        batch.micro_batch_size,
        axis,
        collate_fn=request.collate_fn,
        drop_last=config.dataloader_drop_last,
    )
    if isinstance(request.training_data, Sized) and len(loader) < batch.accumulation_steps:
        warn_once(
            f"training_data has {len(request.training_data)} samples, less than a train_batch_size of "
            f"{batch.train_batch_size}: a pass over it ends before the first optimizer step. Give more data, lower "
            "gradient_accumulation_steps, or go over it again (RepeatingLoader)"
        )
    return loader
