"""Brings sharded weights together on rank 0's host, one parameter at a time, for models saved whole."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from craken.engine.engine import Engine
from craken.zero import GatheredParameters


def consolidated_state_dict(engine: Engine, *, exclude_frozen: bool) -> OrderedDict[str, Tensor] | None:
    """Collective: return the module's state dict with whole weights on rank 0's host, None on other ranks.

    Each tensor owns its memory, but tied weights are one tensor under all their names. Buffers that a state dict holds
    are in it.
    """
    is_first, copies = engine.parts.axis.rank == 0, {}
    for _, param in engine.module.named_parameters():
        if param.requires_grad or not exclude_frozen:
            with GatheredParameters(param):
                if is_first:
                    copies[id(param)] = param.detach().to("cpu", copy=True).contiguous()
    if not is_first:
        return None
    kept = engine.module.state_dict(keep_vars=True)
    buffers = {id(buffer) for buffer in engine.module.buffers()}
    copies |= {id(kept[name]): kept[name].detach().cpu().clone() for name in kept if id(kept[name]) in buffers}
    return OrderedDict((name, copies[id(value)]) for name, value in kept.items() if id(value) in copies)


def save_weights(state: OrderedDict[str, Tensor] | None, path: Path) -> None:
    """Write a state dict, on the rank that has one: as safetensors, or (.bin, .pt, .pth) by torch.

    The file appears whole or not at all.
    """
    if state is None:
        return
    os.makedirs(path.parent, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix in (".bin", ".pt", ".pth"):
            torch.save(state, beside)
        else:
            first_names = {id(value): name for name, value in reversed(state.items())}
            save_file({name: state[name] for name in first_names.values()}, beside, metadata={"format": "pt"})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
