"""Finds ranks that were started with another model, config, optimizer, data set or library, before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from craken.comm import MeshAxis, gather_objects
from craken.version import __version__

_MAY_DIFFER = ("path", "output_file", "job_name", "local_rank")


def check_ranks_agree(config: Mapping[str, Any], model: nn.Module, axis: MeshAxis) -> None:
    """Collective over `axis`: raise the same ValueError on all ranks, naming who differs from rank 0 and in what."""
    mine = {"craken": __version__, "torch": torch.__version__, **_flatten(config)}
    _compare(mine, {"the model": _describe(model)}, axis)


def check_training_agrees(optimizer: Optimizer | None, scheduler: Any, training_data: Any, axis: MeshAxis) -> None:
    """Collective over `axis`: as `check_ranks_agree`, for what the ranks train with."""
    mine = {
        "the optimizer": _class_name(optimizer),
        "the learning-rate schedule": _class_name(scheduler),
        "the number of training samples": str(len(training_data)) if isinstance(training_data, Sized) else "unknown",
    }
    _compare(mine, {"the optimizer's groups": [] if optimizer is None else _describe_groups(optimizer)}, axis)


def _compare(mine: dict[str, str], lists: dict[str, list[str]], axis: MeshAxis) -> None:
    """Collective: raise on all ranks if any rank's facts differ from rank 0's; long lists are compared by digest."""
    digests = {key: hashlib.sha256("\n".join(lines).encode()).hexdigest() for key, lines in lists.items()}
    everyone = gather_objects({**mine, **digests}, axis)
    differing = [rank for rank in range(1, axis.size) if everyone[rank] != everyone[0]]
    if not differing:
        return
    lines = []
    whole = gather_objects(lists, axis)
    for rank in differing:
        for key in sorted(everyone[0].keys() | everyone[rank].keys()):
            theirs, first = everyone[rank].get(key, "absent"), everyone[0].get(key, "absent")
            if theirs == first:
                continue
            if key in lists:
                lines.append(f"rank {rank}: {key}: {_first_difference(whole[rank][key], whole[0][key])}")
            else:
                lines.append(f"rank {rank}: {key} is {theirs}, on rank 0 it is {first}")
    shown = "\n  ".join(lines[:12] + [f"... and {len(lines) - 12} more"] * (len(lines) > 12))
    raise ValueError(
        f"all ranks must be started with the same model, config and data, but rank(s) {_list(differing)} of "
        f"{axis.size} differ from rank 0:\n  {shown}\nStart every rank with the same script, arguments and config file"
    )


def _describe(model: nn.Module) -> list[str]:
    return [
        f"parameter {name} {tuple(param.shape)} {str(param.dtype).removeprefix('torch.')} "
        f"{'trainable' if param.requires_grad else 'frozen'}"
        for name, param in model.named_parameters()
    ]


def _describe_groups(optimizer: Optimizer) -> list[str]:
    """Return a line for each group: its options, then the shapes of its parameters."""
    lines = []
    for index, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if isinstance(value, (bool, int, float, str, tuple))}
        lines.append(f"group {index} with {options}")
        lines += [f"group {index}, parameter of shape {tuple(param.shape)}" for param in group["params"]]
    return lines


def _class_name(value: Any) -> str:
    return "absent" if value is None else type(value).__name__


def _first_difference(theirs: list[str], first: list[str]) -> str:
    for mine, reference in zip(theirs, first, strict=False):
        if mine != reference:
            return f"{mine}, on rank 0 {reference}"
    return f"{len(theirs)} entries, on rank 0 {len(first)}"


def _flatten(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for key, inner in value.items():
            flat.update(_flatten(inner, f"{path}.{key}" if path else str(key)))
        return flat
    if path.rsplit(".", 1)[-1].endswith(_MAY_DIFFER):
        return {}
    return {path: json.dumps(value, default=str)}


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
