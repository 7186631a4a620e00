"""What an imported checkpoint holds, in our terms: the names our engine gives to tensors, and states by parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craken.checkpoint.entry import Piece
from craken.checkpoint.errors import CheckpointDamaged
from craken.spec import OPTIMIZER, WEIGHT, ShardSpec

_STEP, _SUM = "step", OPTIMIZER + "sum"
# settings that belong to the kernel that ran, or to the optimizer's class: ours keeps its own
_NOT_CARRIED = {"params", "param_names", _STEP, "bias_correction", "amsgrad", "maximize", "decoupled_weight_decay"}
_NOT_CARRIED |= {"foreach", "fused", "capturable", "differentiable"}
_FIRST_LOOK = 16  # elements that tell most weights apart

Shape = tuple[int, ...]


class Slot(NamedTuple):
    """Elements [start, start + numel) of a flat tensor are those from `offset` on of a parameter."""

    name: str
    offset: int
    numel: int
    start: int


class Flat(NamedTuple):
    """A flat tensor of masters [>= its slots' end], its optimizer state (as long, or scalars), and what lies where."""

    masters: Tensor
    state: Mapping[str, Any]
    slots: list[Slot]


@dataclass
class Trained:
    """Masters and optimizer states by parameter; the optimizer's groups in the original's order."""

    pieces: list[Piece] = field(default_factory=list)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] | None = None  # None: there was no optimizer
    loss_scale: dict[str, Any] = field(default_factory=lambda: loss_scale_of({}))

    @property
    def names(self) -> set[str]:
        return {piece.spec.fqn for piece in self.pieces if piece.kind == WEIGHT}

    def add(self, flat: Flat, shapes: Mapping[str, Shape], file: Path) -> None:
        """Take in a flat tensor of `file` part by part; nothing is copied. CheckpointDamaged when it is too short."""
        tensors = {key: value for key, value in flat.state.items() if isinstance(value, Tensor) and value.dim() > 0}
        scalars = {key: value for key, value in flat.state.items() if key not in tensors}
        for slot in flat.slots:
            spec = ShardSpec(slot.name, shapes[slot.name], slot.offset, slot.numel)
            for kind, tensor in ((WEIGHT, flat.masters), *((OPTIMIZER + key, value) for key, value in tensors.items())):
                end = slot.start + slot.numel
                if end > tensor.numel():
                    raise CheckpointDamaged(
                        f"{file}: {kind} of {slot.name} should lie at elements [{slot.start}, {end}) "
                        f"of a tensor that has {tensor.numel()}"
                    )
                self.add_piece(kind, spec, tensor.reshape(-1).narrow(0, slot.start, slot.numel))
            if flat.state:  # a state of tensors alone, SGD's momentum, counts too
                self.scalars[slot.name] = scalars_for_torch(scalars)

    def add_piece(self, kind: str, spec: ShardSpec, tensor: Tensor) -> None:
        """Take in a part of a master or of its state as it lies in its file, of any dtype: nothing is copied."""
        self.pieces.append(Piece(kind, spec, tensor.detach().reshape(-1)))

    def rename_states(self) -> None:
        """Give states the names that torch's optimizers have for them, and leave out what the original never reads.

        Its groups' settings tell the classes apart: Adagrad for offloaded states keeps its sum of squares as
        `exp_avg_sq`, Lion for offloaded states makes one beside its momentum.
        """
        settings = set().union(*(self.groups or ()))
        squares = OPTIMIZER + "exp_avg_sq"
        if "eps" in settings and "betas" not in settings:
            self.pieces = [replace(p, kind=_SUM) if p.kind == squares else p for p in self.pieces]
        elif "betas" in settings and "eps" not in settings:
            self.pieces = [p for p in self.pieces if p.kind != squares]

    def check_whole(self, shapes: Mapping[str, Shape], where: Path) -> None:
        """CheckpointDamaged naming the parameters of which the parts do not make up the whole."""
        found = dict.fromkeys(shapes, 0)
        for piece in self.pieces:
            if piece.kind == WEIGHT:
                found[piece.spec.fqn] += piece.spec.numel
        wrong = [
            f"{name} ({found[name]} of {math.prod(shape)} elements)"
            for name, shape in shapes.items()
            if found[name] != math.prod(shape)
        ]
        if wrong:
            raise CheckpointDamaged(f"{where}: the ranks' files do not make up {', '.join(wrong[:4])}")


def scalars_for_torch(scalars: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter's scalar state as torch's optimizers keep it: the step count as an fp32 tensor."""
    return {
        key: torch.tensor(float(value), dtype=torch.float32) if key == _STEP else value
        for key, value in scalars.items()
    }


def options_for_torch(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the optimizer groups' settings without parameters, step counts and what our optimizer decides itself."""
    return [{key: value for key, value in group.items() if key not in _NOT_CARRIED} for group in groups]


def loss_scale_of(scaler: Mapping[str, Any]) -> dict[str, Any]:
    """Return our loss scale's state from the attributes of the original's scaler; a scale of 1 from none."""
    return {
        "value": float(scaler.get("cur_scale") or 1.0),
        "hysteresis_left": int(scaler.get("cur_hysteresis", 1)),
        "steps_seen": int(scaler.get("cur_iter", 0)),
        "last_overflow": int(scaler.get("last_overflow_iter", -1)),
    }


def is_rounded(masters: Tensor, values: Tensor) -> bool:
    """Whether the first of `masters` are what `values` (of any shape) were before they were rounded to their dtype."""
    numel, flat = values.numel(), values.reshape(-1)
    return masters.numel() >= numel and all(
        torch.equal(masters[:end].to(flat.dtype), flat[:end]) for end in (min(_FIRST_LOOK, numel), numel)
    )


def step_of_group(states: Mapping[int, Mapping[str, Any]], members: Iterable[int]) -> int | None:
    """Return the step count that an optimizer keeps for a whole group: it may write it to the last state only."""
    steps = [states[index][_STEP] for index in members if index in states and _STEP in states[index]]
    return None if not steps or any(isinstance(step, Tensor) for step in steps) else max(steps)


def with_step(state: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """Return `state` with the group's step count, if the group keeps one."""
    return dict(state) if step is None else {**state, _STEP: step}
