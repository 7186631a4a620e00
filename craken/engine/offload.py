"""Where a config lets shards rest: on the device, on the host, on a disk."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from craken.checkpoint import do_on_all, run_on_all
from craken.comm import MeshAxis, gather_objects
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
    policy_for_stage,
    whole_numel,
)


def shelf_for(
    config: Config, device: torch.device, axis: MeshAxis, trained: Sequence[nn.Parameter], optimizer: Optimizer | None
) -> Shelf:
    """Return what hands out places. Collective over `axis` where states or weights rest in files.

    OSError, on all ranks, when a folder cannot be used on one, or has too little room for the states of `trained`.
    """
    zero = config.zero_optimization
    disks: dict[Kind, DiskSettings] = {}
    sections: list[tuple[Kind, OffloadParam | OffloadOptimizer]]
    sections = [("weights", zero.offload_param), ("states", zero.offload_optimizer)]
    io = IoSettings(config.aio.block_size, config.aio.queue_depth, config.aio.intra_op_parallelism)
    for kind, section in sections:
        if section.device == "nvme" and (kind == "weights" or _states_place(config) is Place.DISK):
            folder = Path(os.path.expanduser(str(section.nvme_path)))
            wanted = 0
            if kind == "states":
                wanted = _state_bytes(config, trained, optimizer) * _ranks_on_this_host(axis) // axis.size
            disks[kind] = DiskSettings(folder, io, section.buffer_count, section.pin_memory, wanted)
    if not disks:
        return Shelf(Link(device))
    shelf, _ = run_on_all(lambda: (Shelf(Link(device), disks), None), axis, doing="preparing offload")
    return shelf


def _state_bytes(config: Config, trained: Sequence[nn.Parameter], optimizer: Optimizer | None) -> int:
    """Return the least that all ranks together set aside for masters and states.

    0 with a `ratio`: groups leave as a whole, so the share that does is not known yet.
    """
    zero = config.zero_optimization
    if optimizer is None or zero.offload_optimizer.ratio < 1:
        return 0
    is_mixed = config.fp16.enabled or config.bf16.enabled
    has_masters = is_mixed or zero.offload_param.device != "nvme"  # or the weights that rest in files are the masters
    an_element = sum(dtype.itemsize for dtype in state_dtypes(optimizer).values()) + 4 * has_masters
    return an_element * sum(map(whole_numel, trained))


def _ranks_on_this_host(axis: MeshAxis) -> int:
    """Collective over `axis`: return how many of its ranks share this one's disks."""
    host = socket.gethostname()
    return gather_objects(host, axis).count(host)


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
    do_on_all(lambda: swap.reserve(state_dtypes(optimizer)), axis, doing="setting space aside for optimizer states")


def state_swap_for(config: Config, groups: list[ShardGroup], binding: Binding, shelf: Shelf) -> StateSwap | None:
    """Return what brings states to hand that rest in files; reads and writes run beside updates unless told not to."""
    section = config.zero_optimization.offload_optimizer
    if _states_place(config) is not Place.DISK:
        return None
    settings = SwapSettings(reads_ahead=section.pipeline_read, writes_behind=section.pipeline_write)
    return StateSwap(groups, binding, shelf.courier("states"), settings)


_PLACES = {"none": Place.DEVICE, "cpu": Place.HOST, "nvme": Place.DISK}
