"""What an engine puts into a checkpoint, and how it takes it back."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from craken.checkpoint import BackgroundSaver, Piece, Place, Reader, Target, has_latest, run_on_all
from craken.checkpoint import save as save_folder
from craken.comm import broadcast_object, gather_objects, get_accelerator
from craken.engine.engine import Engine
from craken.log import log_dist, warn_once
from craken.precision import DynamicLossScale
from craken.spec import ShardSpec
from craken.zero import can_load, gradient_state, whole_numel
from craken.zero import state as zero_state

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
    target: Target,
    *,
    client_state: dict[str, Any],
    includes_frozen: bool,
    background: BackgroundSaver,
) -> Place:
    """Collective: write the engine's whole state to `target`, if so configured in the background; returns the path."""
    section = engine.parts.config.checkpoint
    if target.keep_last is None:
        target = target._replace(keep_last=section.keep_last)
    if engine.accumulation.in_step and not section.save_gradients:
        log_dist(
            f"saving after {engine.accumulation.in_step} of {engine.accumulation.steps} micro-batches of a step: their "
            "gradients are not saved, a resumed run begins the step anew; checkpoint.save_gradients in the config "
            "saves them",
            level=logging.WARNING,
        )
    pieces, axis = _pieces(engine, includes_frozen=includes_frozen), engine.parts.axis
    rank_state = _rank_state(engine, with_gradients=section.save_gradients)
    shared_state = _shared_state(engine, client_state)
    if section.async_save:
        path = background.save(target, pieces, axis=axis, rank_state=rank_state, shared_state=shared_state)
        log_dist(f"saving {path} in the background: {_in_words(background)}")
        return path
    path = save_folder(
        *target[:2],
        pieces=pieces,
        axis=axis,
        rank_state=rank_state,
        shared_state=shared_state,
        save_latest=target.save_latest,
        keep_last=target.keep_last,
    )
    log_dist(f"saved {path}")
    return path


def load(
    engine: Engine, folder: str | os.PathLike[str], tag: str | None, wanted: Wanted
) -> tuple[str | None, dict[str, Any] | None]:
    """Collective: restore an engine from `folder`; returns (path, client state), (None, None) without a `latest`.

    A failure on any rank, damage above all, is the same error on all; the engine then holds a part of what it was to
    load, and trains again only after another checkpoint has been loaded.
    """
    axis = engine.parts.axis
    # rank 0 decides: without a shared file system another rank might not see `latest`
    if broadcast_object(tag is None and not has_latest(folder), axis):
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
    doing = f"loading {reader.path}"
    restored, can_all = run_on_all(lambda: _restore(engine, reader, wanted), axis, doing=doing)
    if any(has_gradients for _, has_gradients in can_all):
        _resume_step(engine, restored, is_possible=all(can for can, _ in can_all), path=reader.path)
    log_dist(f"loaded {reader.path}")
    return str(reader.path), restored.client_state


@dataclass(frozen=True)
class _Restored:
    """What is left to act on once a checkpoint has been read: the client's state, and a step under way."""

    client_state: dict[str, Any]
    in_step: int = 0
    gradients: dict[str, Any] | None = None


def _restore(engine: Engine, reader: Reader, wanted: Wanted) -> tuple[_Restored, tuple[bool, bool]]:
    """Restore what is wanted besides the weights; also tell whether gradients can be taken, and whether any came."""
    state, axis = reader.shared_state, engine.parts.axis
    if wanted.optimizer and engine.parts.binding is not None and state["optimizer"] is not None:
        _load_optimizer(engine, reader, state["optimizer"])
    if wanted.scheduler and engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if not wanted.progress:
        return _Restored(state["client"]), (False, False)
    _load_progress(engine, state)
    in_step = state.get("in_step", 0)
    if reader.world_size != axis.size:  # there is no state for each rank
        return _Restored(state["client"], in_step), (False, in_step > 0)
    own = reader.rank_state(axis.rank)
    _load_generators(own)
    gradients = own.get("gradients")
    if gradients is None:
        return _Restored(state["client"], in_step), (False, in_step > 0)
    can = can_load(engine.groups, gradients)
    return _Restored(state["client"], in_step, gradients), (can, gradients["has_any"])


def _resume_step(engine: Engine, restored: _Restored, *, is_possible: bool, path: Place) -> None:
    if is_possible:
        assert restored.gradients is not None
        engine.resume_step(restored.gradients, restored.in_step)
        return
    log_dist(
        f"{path} was saved within a step, which begins anew: its gradients were not saved (checkpoint.save_gradients "
        "in the config saves them), or by another number of ranks or at another stage",
        level=logging.WARNING,
    )


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
        "in_step": engine.accumulation.in_step,
        "train_batch_size": engine.train_batch_size(),
        "zero_stage": engine.parts.config.zero_optimization.stage,
        "tied": _tied_names(engine.module),
        "loss_scale": engine.loss_scaler.state_dict(),
        "optimizer": optimizer,
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "dataloader": None if loader is None else loader.state_dict(),
        "client": client_state,
    }


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Return, for each further name of a shared parameter, the one that it is saved under."""
    first = {id(param): name for name, param in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in every if name != first[id(param)]}


def _rank_state(engine: Engine, *, with_gradients: bool) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, keys, position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "device": None if get_accelerator().is_cpu else torch.cuda.get_rng_state(),
        "gradients": gradient_state(engine.groups) if with_gradients else None,
    }


def _in_words(background: BackgroundSaver) -> str:
    stall = background.stall
    assert stall is not None, "a save has begun"
    waited = f", {stall.waited_s * 1e3:.1f} ms of it for the save before" if stall.waited_s >= 1e-3 else ""
    return (
        f"training stood still for {stall.seconds * 1e3:.1f} ms{waited}, {stall.copy_s * 1e3:.1f} ms of it to copy "
        f"{stall.num_bytes:,} bytes of rank 0"
    )


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


def _converting(reader: Reader) -> Callable[[str, ShardSpec, Tensor], None]:
    """Return a `read(kind, spec, out [spec.numel])` that takes floating-point numbers of any dtype."""

    def read(kind: str, spec: ShardSpec, out: Tensor) -> None:
        stored = reader.dtype(kind, spec.fqn)
        if stored == out.dtype or not (stored.is_floating_point and out.is_floating_point()):
            reader.read(kind, spec, out)
            return
        as_stored = torch.empty(spec.numel, dtype=stored, device="cpu")  # [spec.numel]
        reader.read(kind, spec, as_stored)
        out.copy_(as_stored)

    return read


def _load_module(engine: Engine, reader: Reader) -> None:
    read = _converting(reader)
    zero_state.load_weights(engine.groups, read)
    for spec, tensor in zero_state.frozen_pieces(engine.parts.layers.frozen):
        if spec.fqn in reader.names(FROZEN):
            read(FROZEN, spec, tensor)
    saved = {kind: set(reader.names(kind)) for kind in (FROZEN, BUFFER)}
    for kind, name, tensor in _whole_tensors(engine):
        if name in saved[kind]:
            flat = tensor.detach().contiguous().view(-1)
            read(kind, ShardSpec(name, tuple(tensor.shape), 0, tensor.numel()), flat)
            if not tensor.is_contiguous():
                tensor.detach().copy_(flat.view(tensor.shape))


def _load_optimizer(engine: Engine, reader: Reader, saved: dict[str, Any]) -> None:
    assert engine.parts.binding is not None
    swap = engine.parts.swap
    zero_state.load_optimizer(
        engine.parts.binding,
        _kinds_by_name(reader),
        _converting(reader),
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
    if isinstance(engine.loss_scaler, DynamicLossScale) and "steps_seen" in state["loss_scale"]:
        engine.loss_scaler.load_state_dict(state["loss_scale"])  # a scale that does not move is the config's
    saved_size, size = state.get("train_batch_size"), engine.train_batch_size()
    if saved_size not in (None, size):
        warn_once(
            f"saved with a train_batch_size of {saved_size}, going on with {size}: steps are of other samples, the "
            f"loss curve is another; to keep it give a train_batch_size of {saved_size} (gradient_accumulation_steps "
            "makes up for other ranks or micro-batches)"
        )
    if engine.training_dataloader is not None and state["dataloader"] is not None:
        engine.training_dataloader.load_state_dict(state["dataloader"])


def _load_generators(state: dict[str, Any]) -> None:
    if not state:  # imported: there are none
        return
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and not get_accelerator().is_cpu:
        torch.cuda.set_rng_state(state["device"])
