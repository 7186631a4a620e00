"""Where a config lets shards rest: on the device, on the host, on a disk."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from craken.config import Config
from craken.config.sections.zero import OffloadOptimizer, OffloadParam
from craken.disk import IoSettings
from craken.optim import can_step_in_chunks
from craken.zero import (
    Binding,
    DiskSettings,
    Kind,
    Link,
    Place,
    Placement,
    ShardGroup,
    Shelf,
    StateSwap,
    SwapSettings,
)


def shelf_for(config: Config, device: torch.device) -> Shelf:
    """Return what hands out places; OSError when a folder for files cannot be used."""
    zero = config.zero_optimization
    disks: dict[Kind, DiskSettings] = {}
    sections: list[tuple[Kind, OffloadParam | OffloadOptimizer]]
    sections = [("weights", zero.offload_param), ("states", zero.offload_optimizer)]
    named = {_IO_FIELDS[key]: getattr(config.aio, key) for key in config.aio.model_fields_set if key in _IO_FIELDS}
    io = IoSettings(**named)
    for kind, section in sections:
        if section.device == "nvme":
            folder = Path(os.path.expanduser(str(section.nvme_path)))
            disks[kind] = DiskSettings(folder, io, section.buffer_count, section.pin_memory)
    return Shelf(Link(device), disks)


def placement_of(config: Config, shelf: Shelf) -> Placement:
    """Return where groups rest under this config."""
    params, states = config.zero_optimization.offload_param, config.zero_optimization.offload_optimizer
    named = Placement(_PLACES[params.device], _PLACES[states.device], params.pin_memory, states.pin_memory)
    return named.resolve(host_is_device=shelf.link.host_is_device)


def state_swap_for(config: Config, groups: list[ShardGroup], binding: Binding, shelf: Shelf) -> StateSwap | None:
    """Return what brings states to hand that rest in files; reads and writes run beside updates unless told not to."""
    section = config.zero_optimization.offload_optimizer
    if section.device != "nvme":
        return None
    if not can_step_in_chunks(binding.optimizer):
        raise ValueError(
            f"zero_optimization.offload_optimizer.device is 'nvme', but {type(binding.optimizer).__name__} updates all "
            "parameters in one call, which needs all states in memory; use 'cpu', or Adam, AdamW, SGD, Adagrad or Lion"
        )
    named = section.model_fields_set
    settings = SwapSettings(
        reads_ahead=section.pipeline_read or "pipeline_read" not in named,
        writes_behind=section.pipeline_write or "pipeline_write" not in named,
    )
    return StateSwap(groups, binding, shelf.courier("states"), settings)


_IO_FIELDS = {"block_size": "block_bytes", "queue_depth": "queue_depth", "intra_op_parallelism": "num_threads"}
_PLACES = {"none": Place.DEVICE, "cpu": Place.HOST, "nvme": Place.DISK}
