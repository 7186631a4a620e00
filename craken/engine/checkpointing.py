"""What an engine puts into a checkpoint, and how it takes it back."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from craken.checkpoint import Piece, Reader, run_on_all
from craken.checkpoint import save as save_folder
from craken.comm import MeshAxis, broadcast_object, gather_objects, get_accelerator
from craken.engine.engine import Engine
from craken.log import log_dist, warn_once
from craken.spec import ShardSpec
from craken.zero import state as zero_state
from craken.zero import whole_numel

FROZEN, BUFFER = "frozen", "buffer"


@dataclass(frozen=True)
class Wanted:
    """What to restore besides the weights."""

    is_strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    progress: bool = True


def save(
    engine: Engine,
    folder: str | os.PathLike[str],
    *,
    tag: str | None,
    client_state: dict[str, Any],
    save_latest: bool,
    includes_frozen: bool,
) -> Path:
    """Collective: write the engine's whole state to `folder`/`tag`; returns the path."""
    if engine.accumulation.in_step:
        log_dist(
            f"saving after {engine.accumulation.in_step} of {engine.accumulation.steps} micro-batches of a step: their "
            "gradients are not saved, a resumed run begins the step anew",
            level=logging.WARNING,
        )
    path = save_folder(
        folder,
        tag or f"global_step{engine.global_steps}",
        pieces=_pieces(engine, includes_frozen=includes_frozen),
        axis=engine.parts.axis,
        rank_state=_rank_state(),
        shared_state=_shared_state(engine, client_state),
        save_latest=save_latest,
    )
    log_dist(f"saved {path}")
    return path


def load(
    engine: Engine, folder: str | os.PathLike[str], tag: str | None, wanted: Wanted
) -> tuple[str | None, dict[str, Any] | None]:
    """Collective: restore an engine from `folder`; returns (path, client state), (None, None) without a `latest`."""
    folder, axis = Path(folder), engine.parts.axis
    # rank 0 decides: without a shared file system another rank might not see `latest`
    if broadcast_object(tag is None and not (folder / "latest").exists(), axis):
        warn_once(f"{folder} has no file `latest`: nothing was loaded; pass tag=... to name a checkpoint in it")
        return None, None

    def read() -> tuple[Reader, None]:
        reader = Reader(folder, tag)
        _check_weights(engine, reader, is_strict=wanted.is_strict)
        _load_module(engine, reader)
        return reader, None

    reader, _ = run_on_all(read, axis, doing=f"loading a checkpoint from {folder}")
    engine.discard_gradients()
    zero_state.refresh([*engine.groups, *engine.parts.layers.frozen])
    engine.renew_weights()
    state = reader.shared_state
    if wanted.optimizer and engine.parts.binding is not None and state["optimizer"] is not None:
        _load_optimizer(engine, reader, state["optimizer"])
    if wanted.scheduler and engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if wanted.progress:
        _load_progress(engine, state)
        _load_rank_state(reader, engine.parts.axis)
    log_dist(f"loaded {reader.path}")
    return str(reader.path), state["client"]


# --- saving -----------------------------------------------------------------------------------------------------------


def _pieces(engine: Engine, *, includes_frozen: bool) -> Iterator[Piece]:
    for kind, spec, tensor in zero_state.pieces(engine.parts.binding, engine.groups):
        yield Piece(kind, spec, tensor)
    for spec, tensor in zero_state.frozen_pieces(engine.parts.layers.frozen) if includes_frozen else ():
        yield Piece(FROZEN, spec, tensor)
    axis = engine.parts.axis
    for index, (kind, name, tensor) in enumerate(_whole_tensors(engine)):
        # frozen weights are equal on all ranks; buffers (running statistics) may not be: rank 0's count
        writer = index % axis.size if kind == FROZEN else 0
        if writer == axis.rank and (includes_frozen or kind != FROZEN):
            spec = ShardSpec(name, tuple(tensor.shape), 0, tensor.numel())
            yield Piece(kind, spec, tensor.detach().contiguous().view(-1))


def _whole_tensors(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, tensor) of what every rank holds whole: parameters that are not trained, kept buffers."""
    sharded = {id(param) for group in (*engine.groups, *engine.parts.layers.frozen) for param in group.params}
    for name, param in engine.module.named_parameters():
        if id(param) not in sharded:
            yield FROZEN, name, param
    kept = engine.module.state_dict(keep_vars=True)
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            yield BUFFER, name, buffer


def _shared_state(engine: Engine, client_state: dict[str, Any]) -> dict[str, Any]:
    binding, scheduler, loader = engine.parts.binding, engine.lr_scheduler, engine.training_dataloader
    optimizer = None
    if binding is not None:
        everyones = gather_objects(zero_state.scalars(binding), engine.parts.axis)
        optimizer = {
            "scalars": {name: state for one in everyones for name, state in one.items()},
            "groups": zero_state.group_options(binding),
        }
    return {
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "micro_steps": engine.accumulation.micro_steps,
        "zero_stage": engine.parts.config.zero_optimization.stage,
        "loss_scale": engine.loss_scaler.state_dict(),
        "optimizer": optimizer,
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "dataloader": None if loader is None else loader.state_dict(),
        "client": client_state,
    }


def _rank_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys, position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "device": None if get_accelerator().is_cpu else torch.cuda.get_rng_state(),
    }


# --- loading ----------------------------------------------------------------------------------------------------------


def _check_weights(engine: Engine, reader: Reader, *, is_strict: bool) -> None:
    saved = set(reader.names(zero_state.WEIGHT)) | set(reader.names(FROZEN))
    held = {name for name, _ in engine.module.named_parameters()}
    trained = {name for group in engine.groups for name in group.names}
    held -= (empty := {name for name, param in engine.module.named_parameters() if whole_numel(param) == 0})
    trained, saved = trained - empty, saved - empty
    missing = sorted(trained - set(reader.names(zero_state.WEIGHT)))
    if is_strict:
        missing = sorted(held - saved)
    if missing or (is_strict and saved - held):
        raise ValueError(
            f"checkpoint {reader.path} does not fit this model: "
            + "; ".join(
                f"{what} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
                for what, names in (("it lacks", missing), ("it has besides", sorted(saved - held)))
                if names
            )
            + ". Build the model as it was, or pass load_module_strict=False where frozen parameters were left out"
        )


def _load_module(engine: Engine, reader: Reader) -> None:
    zero_state.load_weights(engine.groups, reader.read)
    for spec, tensor in zero_state.frozen_pieces(engine.parts.layers.frozen):
        if spec.fqn in reader.names(FROZEN):
            reader.read(FROZEN, spec, tensor)
    saved = {kind: set(reader.names(kind)) for kind in (FROZEN, BUFFER)}
    for kind, name, tensor in _whole_tensors(engine):
        if name in saved[kind]:
            flat = tensor.detach().contiguous().view(-1)
            reader.read(kind, ShardSpec(name, tuple(tensor.shape), 0, tensor.numel()), flat)
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat.view(tensor.shape))


def _load_optimizer(engine: Engine, reader: Reader, saved: dict[str, Any]) -> None:
    assert engine.parts.binding is not None
    swap = engine.parts.swap
    zero_state.load_optimizer(
        engine.parts.binding,
        _kinds_by_name(reader),
        reader.read,
        saved["scalars"],
        saved["groups"],
        zero_state.empty_state if swap is None else swap.empty_state,
    )


def _kinds_by_name(reader: Reader) -> Callable[[str], list[str]]:
    found: dict[str, list[str]] = {}
    for kind in reader.kinds():
        for name in reader.names(kind):
            found.setdefault(name, []).append(kind)
    return lambda name: found.get(name, [])


def _load_progress(engine: Engine, state: dict[str, Any]) -> None:
    engine.global_steps, engine.skipped_steps = state["global_steps"], state["skipped_steps"]
    engine.accumulation.micro_steps, engine.accumulation.in_step = state["micro_steps"], 0
    engine.loss_scaler.load_state_dict(state["loss_scale"])
    if engine.training_dataloader is not None and state["dataloader"] is not None:
        engine.training_dataloader.load_state_dict(state["dataloader"])


def _load_rank_state(reader: Reader, axis: MeshAxis) -> None:
    if reader.world_size != axis.size:
        return  # another number of ranks: there is no state for each
    state = reader.rank_state(axis.rank)
    if not state:
        return  # imported: there are no generators' states
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and not get_accelerator().is_cpu:
        torch.cuda.set_rng_state(state["device"])
