"""How an engine takes back what a checkpoint holds."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from craken.checkpoint import Place, Reader, Wish, do_on_all, latest_tag, run_on_all
from craken.comm import MeshAxis, get_accelerator
from craken.engine.engine import Engine
from craken.engine.saving import whole_tensors
from craken.log import log_dist, warn_once
from craken.precision import DynamicLossScale
from craken.spec import BUFFER, FROZEN, WEIGHT, ShardSpec
from craken.zero import can_load, whole_shape
from craken.zero import state as zero_state


@dataclass(frozen=True)
class Wanted:
    """What to restore besides the weights."""

    is_strict: bool = True
    optimizer: bool = True
    scheduler: bool = True
    progress: bool = True


def load(
    engine: Engine, folder: str | os.PathLike[str], tag: str | None, wanted: Wanted
) -> tuple[str | None, dict[str, Any] | None]:
    """Collective: restore an engine from `folder`; returns (path, client state), (None, None) without a `latest`.

    A failure on any rank, damage above all, is the same error on all. What does not fit is found before anything is
    touched; after any other failure the engine holds a part of what it was to load, and refuses to go on until another
    checkpoint has been loaded.
    """
    axis = engine.parts.axis
    if engine.parts.config.checkpoint.load_universal:
        warn_once(
            "checkpoint.load_universal asks for nothing: every checkpoint loads on any number of ranks, at any stage"
        )
    tag = _agreed_tag(folder, tag, axis)
    if tag is None:
        warn_once(f"no file {folder}/latest: nothing was loaded; pass tag=... to name a checkpoint in that folder")
        return None, None

    def look() -> tuple[tuple[Reader, dict[str, str], dict[str, Any]], str]:
        reader = Reader(folder, tag)
        kinds, state = _fitting(engine, reader, is_strict=wanted.is_strict), reader.shared_state
        if wanted.optimizer and engine.parts.binding is not None and state["optimizer"] is not None:
            zero_state.check_optimizer(engine.parts.binding, state["optimizer"])
        return (reader, kinds, state), reader.fingerprint

    (reader, kinds, state), fingerprints = run_on_all(look, axis, doing=f"loading checkpoint {tag} from {folder}")
    others = [rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
    if others:
        raise ValueError(f"ranks {others} see another checkpoint at {reader.path} than rank 0: give all the same files")
    doing = f"loading {reader.path}"
    with engine.standing.tearing(doing):
        do_on_all(partial(_load_module, engine, reader, kinds), axis, doing=doing)
        engine.discard_gradients()
        zero_state.refresh([*engine.groups, *engine.parts.layers.frozen])
        engine.renew_weights()
        restored, can_all = run_on_all(lambda: _restore(engine, reader, state, wanted), axis, doing=doing)
        if any(has_gradients for _, has_gradients in can_all):
            _resume_step(engine, restored, is_possible=all(can for can, _ in can_all), path=reader.path)
    log_dist(f"loaded {reader.path}")
    return str(reader.path), restored.client_state


def _agreed_tag(folder: str | os.PathLike[str], tag: str | None, axis: MeshAxis) -> str | None:
    """Collective: return the tag that all ranks asked for, or the one that rank 0 finds in `latest`."""

    def ask() -> tuple[None, tuple[str | None, str | None]]:
        return None, (tag, latest_tag(folder) if tag is None and axis.rank == 0 else None)

    _, told = run_on_all(ask, axis, doing=f"looking for a checkpoint in {folder}")
    tags = [asked for asked, _ in told]
    if len(set(tags)) > 1:
        raise ValueError(f"load_checkpoint(): expected the same tag on all ranks, got {tags}")
    return told[0][1] if tag is None else tag


# --- weights ----------------------------------------------------------------------------------------------------------


def _fitting(engine: Engine, reader: Reader, *, is_strict: bool) -> dict[str, str]:
    """Return the kind under which each tensor of the module was saved; ValueError where checkpoint and engine differ.

    A weight is one, whether it was trained when it was saved and is now or not.
    """
    kinds = {name: kind for kind in (BUFFER, FROZEN, WEIGHT) for name in reader.names(kind)}
    held = {name: tuple(whole_shape(param)) for name, param in engine.module.named_parameters()}
    held |= {name: tuple(buffer.shape) for kind, name, buffer in whole_tensors(engine) if kind == BUFFER}
    trained = {name for group in engine.groups for name in group.names}
    missing = {name for name in held if name not in kinds and 0 not in held[name]}
    unknown = {name for name in kinds if name not in held and 0 not in reader.shape(kinds[name], name)}
    stored = {name: reader.shape(kinds[name], name) for name in held if name in kinds}
    wrong = {f"{name} {list(stored[name])} (here {list(held[name])})" for name in stored if stored[name] != held[name]}
    if not is_strict:
        _say_what_stays(missing - trained, reader.path)
        missing, unknown = missing & trained, set()
    problems = {"it lacks": missing, "it has besides": unknown, "it has in other shapes": wrong}
    if any(problems.values()):
        in_words = "; ".join(f"{what} {_some(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"checkpoint {reader.path} does not fit this model: {in_words}. Build the model as it was, or pass "
            "load_module_strict=False where frozen parameters were left out"
        )
    return {name: kind for name, kind in kinds.items() if name in held}


def _say_what_stays(names: set[str], path: Place) -> None:
    if names:
        log_dist(f"{path} does not hold {_some(names)}: left as they are", level=logging.WARNING)


def _some(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    return ", ".join([first, *rest[:3]]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")


class _Reading:
    """Collects what is to be read, so that tensors come one behind the other; floating-point numbers of any dtype."""

    def __init__(self, reader: Reader, num_ranks: int) -> None:
        self._reader, self._num_ranks = reader, num_ranks
        self._wishes: list[Wish] = []

    def add(self, kind: str, spec: ShardSpec, out: Tensor) -> None:
        """Have `out` [spec.numel] filled by the end of `finish`."""
        stored = self._reader.dtype(kind, spec.fqn)
        if stored != out.dtype and stored.is_floating_point and out.is_floating_point():
            self.now(kind, spec, out)
        else:
            self._wishes.append(self._wish(kind, spec, out))

    def now(self, kind: str, spec: ShardSpec, out: Tensor) -> None:
        """Fill `out` [spec.numel] at once."""
        as_stored = torch.empty(spec.numel, dtype=self._reader.dtype(kind, spec.fqn), device="cpu")
        self._reader.read_all([self._wish(kind, spec, as_stored)])
        out.copy_(as_stored)

    def finish(self) -> None:
        """Read what was collected."""
        self._reader.read_all(self._wishes)

    def _wish(self, kind: str, spec: ShardSpec, out: Tensor) -> Wish:
        is_shared = self._num_ranks > 1 and spec.numel == spec.global_numel  # then it is whole on the others, too
        return Wish(kind, spec, out, is_shared)


def _load_module(engine: Engine, reader: Reader, kinds: Mapping[str, str]) -> None:
    reading = _Reading(reader, engine.parts.axis.size)
    zero_state.load_weights(engine.groups, lambda spec, out: reading.add(kinds[spec.fqn], spec, out))
    for spec, tensor in zero_state.frozen_pieces(engine.parts.layers.frozen):
        if spec.fqn in kinds:
            reading.add(kinds[spec.fqn], spec, tensor)
    for _, name, tensor in whole_tensors(engine):
        if name in kinds:
            spec = ShardSpec.whole(name, tensor.shape)
            if tensor.is_contiguous():
                reading.add(kinds[name], spec, tensor.detach().view(-1))
            else:
                flat = torch.empty(spec.numel, dtype=tensor.dtype, device=tensor.device)
                reading.now(kinds[name], spec, flat)
                tensor.detach().copy_(flat.view(tensor.shape))
    reading.finish()


# --- the rest ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Restored:
    """What is left to act on once a checkpoint has been read: the client's state, and a step under way."""

    client_state: dict[str, Any]
    in_step: int = 0
    gradients: dict[str, Any] | None = None


def _restore(
    engine: Engine, reader: Reader, state: dict[str, Any], wanted: Wanted
) -> tuple[_Restored, tuple[bool, bool]]:
    """Restore what is wanted besides the weights; also tell whether gradients can be taken, and whether any came."""
    axis = engine.parts.axis
    # without a state for each rank where another number saved
    own = reader.rank_state(axis.rank) if reader.world_size == axis.size else {}
    if wanted.optimizer and engine.parts.binding is not None and state["optimizer"] is not None:
        _load_optimizer(engine, reader, state["optimizer"], own)
    if wanted.scheduler and engine.lr_scheduler is not None and state["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if not wanted.progress:
        return _Restored(state["client"]), (False, False)
    _load_progress(engine, state)
    in_step = state.get("in_step", 0)
    if own:  # an imported checkpoint has none either
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


def _load_optimizer(engine: Engine, reader: Reader, saved: dict[str, Any], own: dict[str, Any]) -> None:
    binding, swap = engine.parts.binding, engine.parts.swap
    assert binding is not None
    reading = _Reading(reader, engine.parts.axis.size)
    new_state = zero_state.empty_state if swap is None else swap.empty_state
    zero_state.load_optimizer(binding, _kinds_by_name(reader), reading.add, saved, new_state)
    reading.finish()
    if saved.get("is_partly_of_ranks"):
        if not own:
            raise ValueError(
                f"{reader.path} holds optimizer states that each of {reader.world_size} ranks had for its own parts of "
                "parameters: load it on as many, or pass load_optimizer_states=False"
            )
        zero_state.load_own_states(binding, own["optimizer"])
    fresh = {name for name in binding.named_fragments() if name not in saved["scalars"]}
    if saved["scalars"] and fresh:
        log_dist(f"{reader.path} has no optimizer states of {_some(fresh)}: they begin anew", level=logging.WARNING)


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
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and not get_accelerator().is_cpu:
        torch.cuda.set_rng_state(state["device"])
