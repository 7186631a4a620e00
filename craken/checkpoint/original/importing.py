"""Turns a checkpoint of the original into one of ours: reads and checks all of it, then saves it like any other.

    find the files -> check their bytes -> map them -> pieces (views of mapped bytes) -> save, block by block

Nothing is written before all files have been read and fit each other. Tensors stay in their files until they are
written, so memory holds a block at a time, besides what the kernel caches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from craken.checkpoint.entry import Piece
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.folder import check_tag
from craken.checkpoint.original.contents import Trained
from craken.checkpoint.original.files import check_bytes, read_original
from craken.checkpoint.original.folder import OriginalFolder, find_original
from craken.checkpoint.original.replicated import Names, trained_by_all
from craken.checkpoint.original.universal import trained_by_parameter
from craken.checkpoint.original.zero import cut_by_parameter, flattened, trained_by_ranks
from craken.checkpoint.place import host_path
from craken.checkpoint.saver import save
from craken.comm import MeshAxis
from craken.log import warn_once
from craken.spec import BUFFER, FROZEN, OPTIMIZER, ShardSpec

_ALONE = MeshAxis("import", None, 0, 1)
_NOT_CARRIED = ("data_sampler", "random_ltd")
# what the original puts beside the client's state
_ITS_OWN = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "lr_scheduler", "sparse_tensor_module_names", "skipped_steps", "global_steps"),
    *("global_samples", "dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
    *_NOT_CARRIED,
}


class Imported(NamedTuple):
    """What an import wrote, and of what."""

    path: Path
    num_trained: int
    num_frozen: int
    states: list[str]  # of the optimizer, such as exp_avg
    global_steps: int


def import_original(
    source: str | os.PathLike[str], out: str | os.PathLike[str], tag: str | None = None, *, names: Names | None = None
) -> Imported:
    """Write `out`/TAG and `latest` in our format from a checkpoint of the original in `source`.

    source: a save folder (tag: None takes the one its `latest` names) or a tag's own folder. names: the parameters of
    each optimizer group, for stage-0 files that leave it open. ValueError, NotImplementedError, CheckpointNotFound or
    CheckpointDamaged for what cannot be read, FileExistsError when `out` has the tag, all before anything is written;
    OSError when the file system refuses.
    """
    out, found = host_path(out), find_original(host_path(source), tag)
    check_tag(found.tag)
    target = out / found.tag
    if target.exists() or target.is_symlink():
        raise FileExistsError(f"{target} exists, nothing is overwritten: choose another folder")
    for file in found.files:
        check_bytes(file)
    models = [_model_in(file) for file in found.model_files]
    trained = _trained(found, models[0], names)
    trained.rename_states()
    pieces = [*trained.pieces, *_untrained(found, models, trained)]
    save(
        out,
        found.tag,
        pieces=pieces,
        axis=_ALONE,
        rank_state={},  # the original keeps no generators' states
        shared_state=_shared_state(models[0], trained),
    )
    kinds = {piece.kind for piece in pieces}
    return Imported(
        target,
        len(trained.names),
        len({piece.spec.fqn for piece in pieces if piece.kind == FROZEN}),
        sorted(kind.removeprefix(OPTIMIZER) for kind in kinds if kind.startswith(OPTIMIZER)),
        models[0]["global_steps"],
    )


def _model_in(file: Path) -> dict[str, Any]:
    model = read_original(file)
    if not isinstance(model, dict) or not {"module", "global_steps", "dp_world_size"} <= set(model):
        raise ValueError(f"{file} holds no engine's state; expected what the original's `save_checkpoint` writes")
    return model


def _trained(found: OriginalFolder, model: dict[str, Any], names: Names | None) -> Trained:
    if found.universal is not None:
        return trained_by_parameter(
            found.universal, model["param_shapes"], {} if found.is_cut_by_parameter else model["module"]
        )
    if found.optimizer_files:
        num_ranks = len(found.optimizer_files)
        if model["dp_world_size"] != num_ranks:
            raise ValueError(
                f"{found.path} was saved by {model['dp_world_size']} ranks and has optimizer files of {num_ranks}: "
                "some are missing, or it holds two checkpoints of different numbers of ranks"
            )
        return trained_by_ranks(found.optimizer_files, model["param_shapes"], model["module"])
    if model["param_shapes"] is not None:
        raise CheckpointDamaged(f"{found.path}: the optimizer files (*_optim_states.pt) are missing: copy all files")
    return trained_by_all(found.model_files[0], _weights_once(model), model["optimizer"], names)


def _weights_once(model: dict[str, Any]) -> dict[str, Tensor]:
    """Return a model file's whole parameters by name, tied ones under their first name only."""
    buffers, seen, found = set(model["buffer_names"]), set(model["shared_params"] or ()), {}
    storages: set[tuple[int, tuple[int, ...]]] = set()
    for name, value in model["module"].items():
        if not isinstance(value, Tensor) or name in buffers or name in seen:
            continue
        place = (value.data_ptr(), tuple(value.shape))
        if value.numel() == 0 or place not in storages:
            found[name] = value
        storages.add(place)
    return found


def _untrained(found: OriginalFolder, models: Sequence[dict[str, Any]], trained: Trained) -> Iterator[Piece]:
    model = models[0]
    for name in model["buffer_names"]:
        if name in model["module"]:
            yield _piece(BUFFER, ShardSpec.whole(name, model["module"][name].shape), model["module"][name])
    if not found.is_cut_by_parameter:
        for name, value in _weights_once(model).items():
            if name not in trained.names:
                yield _piece(FROZEN, ShardSpec.whole(name, value.shape), value)
        return
    shapes = flattened([model["frozen_param_shapes"] or {}])
    for rank, part in enumerate(models):
        for name, fragment in (part["frozen_param_fragments"] or {}).items():
            offset, numel, _ = cut_by_parameter(math.prod(shapes[name]), rank, len(models))
            if fragment.numel() < numel:
                raise CheckpointDamaged(
                    f"{found.model_files[rank]}: the part of {name} has {fragment.numel()} elements, expected {numel}"
                )
            yield _piece(FROZEN, ShardSpec(name, shapes[name], offset, numel), fragment.reshape(-1)[:numel])


def _piece(kind: str, spec: ShardSpec, tensor: Tensor) -> Piece:
    return Piece(kind, spec, tensor.detach().reshape(-1))


def _shared_state(model: dict[str, Any], trained: Trained) -> dict[str, Any]:
    """Return what an engine keeps once for all ranks; says which states have no place in it."""
    for key in _NOT_CARRIED:
        if model.get(key):
            warn_once(f"{key} is not carried over: there is no such state here")
    config = model["ds_config"] if isinstance(model.get("ds_config"), dict) else {}
    accumulation = config.get("gradient_accumulation_steps", 1)
    return {
        "global_steps": model["global_steps"],
        "skipped_steps": model["skipped_steps"],
        "micro_steps": model["global_steps"] * (accumulation if isinstance(accumulation, int) else 1),
        "zero_stage": config.get("zero_optimization", {}).get("stage", 0),
        "loss_scale": trained.loss_scale,
        "optimizer": None if trained.groups is None else {"scalars": trained.scalars, "groups": trained.groups},
        "lr_scheduler": model["lr_scheduler"],
        "dataloader": None,
        "client": {key: value for key, value in model.items() if key not in _ITS_OWN},
    }
