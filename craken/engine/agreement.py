"""Finds ranks that were started with another model, config or library, before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from craken.comm import MeshAxis, gather_objects
from craken.version import __version__

_MAY_DIFFER = ("path", "output_file", "job_name", "local_rank")


def check_ranks_agree(config: Mapping[str, Any], model: nn.Module, axis: MeshAxis) -> None:
    """Collective over `axis`: raise the same ValueError on all ranks, naming who differs from rank 0 and in what."""
    mine = {"craken": __version__, "torch": torch.__version__, "model": _digest_of_model(model)}
    mine.update(_flatten(config))
    everyone = gather_objects(mine, axis)
    differing = [rank for rank in range(1, axis.size) if everyone[rank] != everyone[0]]
    if not differing:
        return
    lines = []
    descriptions = gather_objects(_describe(model), axis)
    for rank in differing:
        for key in sorted(everyone[0].keys() | everyone[rank].keys()):
            theirs, first = everyone[rank].get(key, "absent"), everyone[0].get(key, "absent")
            if theirs == first:
                continue
            if key == "model":
                lines.append(f"rank {rank}: the model: {_first_difference(descriptions[rank], descriptions[0])}")
            else:
                lines.append(f"rank {rank}: {key} is {theirs}, on rank 0 it is {first}")
    shown = "\n  ".join(lines[:12] + [f"... and {len(lines) - 12} more"] * (len(lines) > 12))
    raise ValueError(
        f"all ranks must be started with the same model and config, but rank(s) {_list(differing)} of {axis.size} "
        f"differ from rank 0:\n  {shown}\nStart every rank with the same script, arguments and config file"
    )


def _describe(model: nn.Module) -> list[str]:
    return [
        f"{name} {tuple(param.shape)} {str(param.dtype).removeprefix('torch.')} "
        f"{'trainable' if param.requires_grad else 'frozen'}"
        for name, param in model.named_parameters()
    ]


def _digest_of_model(model: nn.Module) -> str:
    return hashlib.sha256("\n".join(_describe(model)).encode()).hexdigest()


def _first_difference(theirs: list[str], first: list[str]) -> str:
    for mine, reference in zip(theirs, first, strict=False):
        if mine != reference:
            return f"parameter {mine}, on rank 0 {reference}"
    return f"{len(theirs)} parameters, on rank 0 {len(first)}"


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
