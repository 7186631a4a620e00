"""Where a config lets shards rest: on the device, on the host, on a disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from craken.checkpoint import run_on_all
from craken.comm import MeshAxis, get_local_world_size
from craken.config import Config
from craken.config.sections.zero import OffloadOptimizer, OffloadParam
from craken.disk import IoSettings
from craken.log import warn_once
from craken.optim import can_step_in_chunks, state_dtypes
from craken.zero import (
    Binding,
    DiskSettings,
    Keep,
    Kind,
    Link,
    Place,
    Placement,
    ShardGroup,
    Shelf,
    StateSwap,
    SwapSettings,
    is_castable,
    policy_for_stage,
    whole_numel,
)


class Load(NamedTuple):
    """What may rest in files: all parameters of the model, those that train, and what trains them."""

    params: Sequence[nn.Parameter]
    trained: Sequence[nn.Parameter]
    optimizer: Optimizer | None


def shelf_for(config: Config, device: torch.device, axis: MeshAxis, load: Load) -> Shelf:
    """Return what hands out places. Collective over `axis` where states or weights rest in files.

    OSError, on all ranks, when a folder cannot be used on one, or has too little room for `load`.
    """
    zero = config.zero_optimization
    disks: dict[Kind, DiskSettings] = {}
    sections: list[tuple[Kind, OffloadParam | OffloadOptimizer]]
    sections = [("weights", zero.offload_param), ("states", zero.offload_optimizer)]
    io = IoSettings(config.aio.block_size, config.aio.queue_depth, config.aio.intra_op_parallelism)
    for kind, section in sections:
        if section.device == "nvme" and (kind == "weights" or _states_place(config) is Place.DISK):
            folder = Path(os.path.expanduser(str(section.nvme_path)))
            wanted = _bytes_in_files(kind, config, load) * get_local_world_size() // axis.size
            disks[kind] = DiskSettings(folder, io, section.buffer_count, section.pin_memory, wanted)
    if not disks:
        return Shelf(Link(device))
    shelf, _ = run_on_all(lambda: (Shelf(Link(device), disks), None), axis, doing="preparing offload")
    return shelf


def _bytes_in_files(kind: Kind, config: Config, load: Load) -> int:
    """Return the least that all ranks together set aside: padding is left out, and what stays whole."""
    zero = config.zero_optimization
    compute = torch.float16 if config.fp16.enabled else torch.bfloat16 if config.bf16.enabled else None
    if kind == "weights":
        sharded = [param for param in load.params if whole_numel(param) > zero.stage3_param_persistence_threshold]
        return sum(
            whole_numel(param) * (compute if compute and is_castable(param) else param.dtype).itemsize
            for param in sharded
        )
    moments = {} if load.optimizer is None else state_dtypes(load.optimizer)
    master_is_weights = compute is None and zero.offload_param.device == "nvme"
    an_element = sum(dtype.itemsize for dtype in moments.values()) + (0 if master_is_weights else 4)
    return int(zero.offload_optimizer.ratio * an_element * sum(whole_numel(param) for param in load.trained))


def placement_of(config: Config, shelf: Shelf) -> Placement:
    """Return where groups rest under this config."""
    params, states = config.zero_optimization.offload_param, config.zero_optimization.offload_optimizer
    named = Placement(_PLACES[params.device], _states_place(config), params.pin_memory, states.pin_memory)
    return named.resolve(host_is_device=shelf.link.host_is_device)


def _states_place(config: Config) -> Place:
    zero = config.zero_optimization
    if policy_for_stage(zero.stage).optimizer is Keep.SHARD:
        return _PLACES[zero.offload_optimizer.device]
    if zero.offload_optimizer.device != "none":
        warn_once(
            "zero_optimization.offload_optimizer has no effect at stage 0, where every rank steps the whole optimizer; "
            "choose stage 1, 2 or 3"
        )
    return Place.DEVICE


def check_states_can_rest(config: Config, optimizer: Optimizer | None) -> None:
    """Raise ValueError for an optimizer whose states cannot rest in files."""
    if _states_place(config) is Place.DISK and optimizer is not None and not can_step_in_chunks(optimizer):
        raise ValueError(
            f"zero_optimization.offload_optimizer.device is 'nvme', but this {type(optimizer).__name__} must update "
            "all parameters in one call (as do LAMB, Muon, optimizers with hooks on step() and unknown classes), with "
            "all states in memory; use 'cpu', or Adam, AdamW, SGD, Adagrad or Lion without hooks"
        )


def reserve_states(swap: StateSwap, optimizer: Optimizer, axis: MeshAxis) -> None:
    """Collective over `axis`: set space aside for the states that the optimizer will have; all ranks raise, or none."""

    def reserve() -> tuple[None, None]:
        swap.reserve(state_dtypes(optimizer))
        return None, None

    run_on_all(reserve, axis, doing="setting space aside for optimizer states")


def state_swap_for(config: Config, groups: list[ShardGroup], binding: Binding, shelf: Shelf) -> StateSwap | None:
    """Return what brings states to hand that rest in files; reads and writes run beside updates unless told not to."""
    section = config.zero_optimization.offload_optimizer
    if _states_place(config) is not Place.DISK:
        return None
    settings = SwapSettings(reads_ahead=section.pipeline_read, writes_behind=section.pipeline_write)
    return StateSwap(groups, binding, shelf.courier("states"), settings)


_PLACES = {"none": Place.DEVICE, "cpu": Place.HOST, "nvme": Place.DISK}
