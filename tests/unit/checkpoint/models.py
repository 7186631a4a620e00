"""Checkpoints of small models, saved as an engine on several ranks saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.unit.checkpoint.ranks import Brought, numbers, save_on_ranks, shard

Tensors = dict[str, Tensor]


def save_model(
    folder: Path,
    weights: Tensors,
    *,
    tag: str = "global_step1",
    frozen: Tensors | None = None,
    buffers: Tensors | None = None,
    optimizer: Tensors | None = None,
    num_ranks: int = 3,
    **shared: Any,
) -> Path:
    """Save weights in uneven parts on several ranks, buffers on the first; return the tag's folder."""
    brought = [Brought(shared_state=shared) for _ in range(num_ranks)]
    for kind, tensors in (("weight", weights), ("frozen", frozen), ("optimizer.exp_avg", optimizer)):
        for name, full in (tensors or {}).items():
            cuts = [0, *(full.numel() * (r + 1) // (num_ranks + 1) for r in range(num_ranks - 1)), full.numel()]
            for rank in range(num_ranks):
                if cuts[rank] < cuts[rank + 1]:
                    brought[rank].pieces.append(shard(kind, name, full, cuts[rank], cuts[rank + 1]))
    for name, full in (buffers or {}).items():
        brought[0].pieces.append(shard("buffer", name, full, 0, full.numel()))
    results = save_on_ranks(folder, tag, brought)
    assert results == [folder / tag] * num_ranks, results
    return folder / tag


def two_layers() -> Tensors:
    return {
        "embed.weight": numbers(11, 6, seed=1),
        "layers.0.proj.weight": numbers(8, 6, seed=2),
        "layers.0.proj.bias": numbers(8, seed=3),
        "layers.1.proj.weight": numbers(6, 8, seed=4),
    }


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def same(found: Tensors, expected: Tensors) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
