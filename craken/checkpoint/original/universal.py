"""Takes masters and optimizer states from a universal checkpoint, which has a folder of whole tensors a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from craken.checkpoint.errors import CheckpointDamaged, CheckpointNotFound
from craken.checkpoint.original.contents import (
    Trained,
    is_rounded,
    loss_scale_of,
    options_for_torch,
    scalars_for_torch,
)
from craken.checkpoint.original.files import read_original
from craken.spec import OPTIMIZER, WEIGHT, ShardSpec

SETTINGS_NAME = "optimizer_state.pt"
_MASTER, _STEP = "fp32", "step"


def trained_by_parameter(
    folder: Path, shapes: Sequence[Mapping[str, Sequence[int]]], weights: Mapping[str, Tensor]
) -> Trained:
    """Read `folder` (TAG/zero); `shapes` come from the model file, a mapping for each flat tensor it was made from.

    weights: those that the model file holds whole; masters are compared with them. CheckpointNotFound for a parameter
    without a master, CheckpointDamaged for one of another size, ValueError for one that is not that of its weight.
    """
    settings = read_original(folder / SETTINGS_NAME)
    trained = Trained(groups=options_for_torch(settings["param_groups"]))
    if "loss_scaler" in settings:
        trained.loss_scale = loss_scale_of(vars(settings["loss_scaler"]))
    states = settings.get("optimizer_state_dict", {}).get("state", {})  # stage 3: the steps are only here
    for index, group in enumerate(shapes):
        step = states.get(index, {}).get(_STEP)
        for name, shape in group.items():
            _add(trained, folder / name, ShardSpec.whole(name, shape), step)
    masters = {piece.spec.fqn: piece.tensor for piece in trained.pieces if piece.kind == WEIGHT}
    if wrong := [name for name in masters if name in weights and not is_rounded(masters[name], weights[name])]:
        raise ValueError(
            f"{folder}: the masters of {', '.join(wrong[:4])}, rounded, do not equal the weights in the model file. "
            "The original's converter mixes parameters up under round_robin_gradients: import what it was made from"
        )
    return trained


def _add(trained: Trained, folder: Path, spec: ShardSpec, step: Any) -> None:
    files = {path.stem: path for path in sorted(folder.glob("*.pt"))}
    if _MASTER not in files:
        raise CheckpointNotFound(f"{folder / _MASTER}.pt is missing: copy all files of the checkpoint")
    if _STEP in files:
        step = read_original(files.pop(_STEP))
    for key, file in files.items():
        content = read_original(file)
        tensor = content["param"] if isinstance(content, dict) else content
        if not isinstance(tensor, Tensor) or tensor.numel() != spec.numel:
            size = tensor.numel() if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointDamaged(f"{file} holds {size} elements, expected the {spec.numel} of {spec.global_shape}")
        trained.add_piece(WEIGHT if key == _MASTER else OPTIMIZER + key, spec, tensor)
    if step is not None:
        trained.scalars[spec.fqn] = scalars_for_torch({_STEP: step})
