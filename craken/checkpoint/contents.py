"""What a checkpoint holds, from its index alone: progress, topology, sizes by kind and file, states by key."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from craken.checkpoint import folder as folders
from craken.checkpoint.blocks import size_problem
from craken.checkpoint.consolidated import locate
from craken.checkpoint.entry import dtype_of
from craken.checkpoint.index import Index, TensorRecord, read_index
from craken.checkpoint.place import Place, is_file, read_bytes
from craken.spec import FROZEN, OPTIMIZER, WEIGHT

_SHOWN_ITEMS = 6


@dataclass(frozen=True)
class KindFacts:
    """All tensors of one kind together."""

    kind: str
    num_tensors: int
    numel: int
    num_bytes: int
    dtypes: list[str]


@dataclass(frozen=True)
class FileFacts:
    """One file; `problem` says what is wrong with its presence or size."""

    name: str
    num_bytes: int
    problem: str | None


@dataclass(frozen=True)
class TensorFacts:
    """One stored tensor and how many pieces it lies in."""

    kind: str
    name: str
    shape: list[int]
    dtype: str
    num_bytes: int
    num_pieces: int


@dataclass(frozen=True)
class Contents:
    """All that `craken inspect` tells; `states` are brief texts, None for what was not saved."""

    path: str
    tag: str
    tags: list[str]
    latest: str | None
    num_ranks: int
    num_parameters: int
    progress: dict[str, Any]
    optimizer: list[dict[str, Any]] | None
    optimizer_states: list[str]
    loss_scale: Any
    lr_scheduler: Any
    dataloader: Any
    client_state: list[str]
    kinds: list[KindFacts]
    files: list[FileFacts]
    tensors: list[TensorFacts]


def describe(checkpoint: str | os.PathLike[str], tag: str | None = None) -> Contents:
    """Read the index of a checkpoint and tell what is in it; no tensor is read.

    CheckpointNotFound lists the tags that exist; CheckpointDamaged when the index itself is.
    """
    folder, name = locate(checkpoint, tag)
    tag, path = folders.find(folder, name)
    index = read_index(path)
    state = index.shared_state if isinstance(index.shared_state, Mapping) else {}
    optimizer = state.get("optimizer") or None
    kinds = _kinds(index)
    return Contents(
        path=str(path),
        tag=tag,
        tags=folders.list_tags(folder),
        latest=_latest(folder),
        num_ranks=index.world_size,
        num_parameters=sum(fact.numel for fact in kinds if fact.kind in (WEIGHT, FROZEN)),
        progress={key: state.get(key) for key in ("global_steps", "skipped_steps", "micro_steps", "zero_stage")},
        optimizer=None if optimizer is None else [brief(group) for group in optimizer.get("groups", [])],
        optimizer_states=[kind.kind.removeprefix(OPTIMIZER) for kind in kinds if kind.kind.startswith(OPTIMIZER)],
        loss_scale=brief(state.get("loss_scale")),
        lr_scheduler=brief(state.get("lr_scheduler")),
        dataloader=brief(state.get("dataloader")),
        client_state=_keys(state.get("client")),
        kinds=kinds,
        files=[FileFacts(file.name, file.num_bytes, size_problem(path, file)) for file in index.files],
        tensors=[_tensor_facts(record) for record in index.tensors.values()],
    )


def brief(value: Any) -> Any:
    """Return an encoded state as plain JSON values that are short: tensors and long lists become a word on them."""
    if isinstance(value, list):
        shown = [brief(item) for item in value[:_SHOWN_ITEMS]]
        return [*shown, f"... {len(value)} in all"] if len(value) > _SHOWN_ITEMS else shown
    if not isinstance(value, Mapping):
        return value
    tag = value.get("$")
    if tag is None:
        return {key: brief(item) for key, item in value.items()}
    if tag in ("tuple", "set", "frozenset"):
        return brief(value["items"])
    if tag in ("dict", "OrderedDict"):
        return {str(brief(key)): brief(item) for key, item in value["pairs"]}
    return value["text"] if tag == "float" else f"({tag})"


def _keys(client: Any) -> list[str]:
    known = brief(client)
    return list(known) if isinstance(known, Mapping) else []


def _kinds(index: Index) -> list[KindFacts]:
    found: dict[str, list[TensorRecord]] = {}
    for record in index.tensors.values():
        found.setdefault(record.kind, []).append(record)
    return [
        KindFacts(
            kind,
            len(records),
            sum(math.prod(record.shape) for record in records),
            sum(_num_bytes(record) for record in records),
            sorted({record.dtype for record in records}),
        )
        for kind, records in found.items()
    ]


def _num_bytes(record: TensorRecord) -> int:
    return math.prod(record.shape) * dtype_of(record.dtype).itemsize


def _tensor_facts(record: TensorRecord) -> TensorFacts:
    pieces = len(record.pieces)
    return TensorFacts(record.kind, record.fqn, list(record.shape), record.dtype, _num_bytes(record), pieces)


def _latest(folder: Place) -> str | None:
    path = folder / folders.LATEST_NAME
    return read_bytes(path).decode("utf-8", "replace").strip() if is_file(path) else None
