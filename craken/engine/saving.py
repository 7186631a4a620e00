"""What an engine puts into a checkpoint."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from craken.checkpoint import BackgroundSaver, Piece, Place, Target, run_on_all
from craken.checkpoint import save as save_folder
from craken.checkpoint.entry import SHARED_STATE
from craken.checkpoint.state_codec import EncodedState, encode_state
from craken.comm import get_accelerator
from craken.engine.engine import Engine
from craken.log import log_dist
from craken.spec import BUFFER, FROZEN, ShardSpec
from craken.zero import gradient_state
from craken.zero import state as zero_state


def save(
    engine: Engine,
    target: Target,
    *,
    client_state: dict[str, Any],
    includes_frozen: bool,
    background: BackgroundSaver,
) -> Place:
    """Collective: write the engine's whole state to `target`, if so configured in the background; returns the path."""
    since_s, section = time.perf_counter(), engine.parts.config.checkpoint
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
    states, everyones = run_on_all(
        lambda: _states(engine, client_state, with_gradients=section.save_gradients), axis, doing=target.doing
    )
    if (optimizer := states.shared["optimizer"]) is not None:
        optimizer["scalars"] = {name: scalars for one, _ in everyones for name, scalars in one.items()}
        optimizer["is_partly_of_ranks"] = any(has_own for _, has_own in everyones)
    if section.async_save:
        path = background.save(
            target, pieces, axis=axis, rank_state=states.own, shared_state=states.shared, since_s=since_s
        )
        log_dist(f"saving {path} in the background: {_in_words(background)}")
        return path
    path = save_folder(
        *target[:2],
        pieces=pieces,
        axis=axis,
        rank_state=states.own,
        shared_state=states.shared,
        save_latest=target.save_latest,
        keep_last=target.keep_last,
    )
    log_dist(f"saved {path}")
    return path


def _pieces(engine: Engine, *, includes_frozen: bool) -> Iterator[Piece]:
    for kind, spec, tensor in zero_state.pieces(engine.parts.binding, engine.groups):
        yield Piece(kind, spec, tensor)
    for spec, tensor in zero_state.frozen_pieces(engine.parts.layers.frozen) if includes_frozen else ():
        yield Piece(FROZEN, spec, tensor)
    axis = engine.parts.axis
    for index, (kind, name, tensor) in enumerate(whole_tensors(engine)):
        # frozen weights are equal on all ranks; buffers (running statistics) may not be: rank 0's count
        writer = index % axis.size if kind == FROZEN else 0
        if writer == axis.rank and (includes_frozen or kind != FROZEN):
            yield Piece(kind, ShardSpec.whole(name, tensor.shape), tensor.detach().contiguous().view(-1))


def whole_tensors(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (kind, name, tensor) of what every rank holds whole: parameters that are not trained, kept buffers."""
    sharded = {id(param) for group in (*engine.groups, *engine.parts.layers.frozen) for param in group.params}
    for name, param in engine.module.named_parameters():
        if id(param) not in sharded:
            yield FROZEN, name, param
    kept = engine.module.state_dict(keep_vars=True)
    for name, buffer in engine.module.named_buffers():
        if name in kept:
            yield BUFFER, name, buffer


class _States(NamedTuple):
    """What is saved besides tensors that are cut into pieces."""

    own: dict[str, Any]
    shared: dict[str, Any]


def _states(
    engine: Engine, client_state: dict[str, Any], *, with_gradients: bool
) -> tuple[_States, tuple[dict[str, EncodedState], bool]]:
    """Return this rank's and everyone's states; of the optimizer's, what others are to know and whether it has more.

    What they are to know is encoded by parameter: step counts travel as text, tensors would take 200 us each.
    """
    binding, scheduler, loader = engine.parts.binding, engine.lr_scheduler, engine.training_dataloader
    own = _rank_state(engine, with_gradients=with_gradients)
    optimizer: dict[str, Any] | None = None
    scalars: dict[str, dict[str, Any]] = {}
    if binding is not None:
        scalars, own["optimizer"] = zero_state.other_states(binding, engine.groups)
        optimizer = {"class": zero_state.class_names(binding), "groups": zero_state.group_options(binding)}
    shared = {
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
    root = f"{SHARED_STATE}.optimizer.scalars"
    known = {name: encode_state(state, root=f"{root}.{name}") for name, state in scalars.items()}
    return _States(own, shared), (known, bool(own.get("optimizer")))


def _tied_names(module: nn.Module) -> dict[str, str]:
    """Return, for each further name of a shared parameter, the one that it is saved under."""
    first = {id(param): name for name, param in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(param)] for name, param in every if name != first[id(param)]}


def _rank_state(engine: Engine, *, with_gradients: bool) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
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
