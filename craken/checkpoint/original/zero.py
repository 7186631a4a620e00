"""Puts the parts of masters and optimizer states together that the original's ranks wrote, a file each.

    stages 1, 2   the parameters of an optimizer group lie end to end in one flat tensor, cut into equal parts, one a
                  rank; in the order of the shapes, or (round_robin_gradients, N ranks) every N-th from the first on,
                  then every N-th from the second on, ... The files record the first order even then; the weights tell.
    stage 3       each parameter is cut by itself, rank r keeping elements [r * c, (r + 1) * c) of it with
                  c = ceil(numel / ranks), padded; a file's flat tensors hold its parts in the order of the shapes.

Nothing is copied: a part is a view of a file's mapped bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from craken.checkpoint.original.contents import (
    Flat,
    Shape,
    Slot,
    Trained,
    is_rounded,
    loss_scale_of,
    options_for_torch,
)
from craken.checkpoint.original.files import read_original
from craken.log import warn_once

Shapes = Sequence[Mapping[str, Sequence[int]]]  # a mapping for each flat tensor: name -> shape
_MASTERS, _MASTERS_BY_PARAMETER = "single_partition_of_fp32_groups", "fp32_flat_groups"


def trained_by_ranks(files: Sequence[Path], shapes: Shapes, weights: Mapping[str, Tensor]) -> Trained:
    """Read the optimizer files of ranks 0, 1, ...; `shapes` and `weights` come from the model file.

    weights: whole parameters, compared with the masters of stages 1 and 2. CheckpointDamaged when the parts do not
    make up the parameters; ValueError when files are of another number of ranks, or of another save than the weights.
    """
    states = [_state_in(file, len(files), len(shapes)) for file in files]
    is_by_parameter = _MASTERS_BY_PARAMETER in states[0]
    base = states[0]["optimizer_state_dict" if is_by_parameter else "base_optimizer_state"]
    scaler = states[0].get("loss_scaler")
    trained = Trained(groups=_groups_in(base), loss_scale=loss_scale_of(vars(scaler) if scaler else {}))
    shape_of = flattened(shapes)
    for index, group in enumerate(shapes):
        if is_by_parameter:
            flats: Iterable[Flat] = [
                _flat_by_parameter(state, index, group, rank, len(files)) for rank, state in enumerate(states)
            ]
        else:
            flats = _flats(states, index, group, weights, files[0].parent)
        for file, flat in zip(files, flats, strict=True):
            trained.add(flat, shape_of, file)
    trained.check_whole(shape_of, files[0].parent)
    return trained


def flattened(shapes: Shapes) -> dict[str, Shape]:
    """Return name -> shape of all groups together."""
    return {name: tuple(shape) for group in shapes for name, shape in group.items()}


def cut_by_parameter(numel: int, rank: int, num_ranks: int) -> tuple[int, int, int]:
    """Return where rank's part of a tensor begins at stage 3, how much of the tensor it holds, and its padded size."""
    padded = -(-numel // num_ranks)
    offset = min(rank * padded, numel)
    return offset, min(padded, numel - offset), padded


def cut_end_to_end(numels: Mapping[str, int], lengths: Sequence[int]) -> list[list[Slot]]:
    """Return what lies where in each part when tensors lie end to end, cut into parts of `lengths` elements."""
    parts: list[list[Slot]] = []
    part_begin = 0
    for length in lengths:
        begin, slots = 0, []
        for name, numel in numels.items():
            low, high = max(begin, part_begin), min(begin + numel, part_begin + length)
            if low < high:
                slots.append(Slot(name, low - begin, high - low, low - part_begin))
            begin += numel
        parts.append(slots)
        part_begin += length
    return parts


def _state_in(file: Path, num_files: int, num_flats: int) -> dict[str, Any]:
    content = read_original(file)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not (_MASTERS in state or _MASTERS_BY_PARAMETER in state):
        raise ValueError(
            f"{file} holds no optimizer state of stages 1 to 3; expected what the original's save_checkpoint writes"
        )
    counts = state.get("partition_count", num_files)
    if any(count != num_files for count in (counts if isinstance(counts, list) else [counts])):
        raise ValueError(
            f"{file} is one of {counts} parts, but there are {num_files} optimizer files: the folder lacks some, or "
            "holds two checkpoints of different numbers of ranks"
        )
    found = len(state[_MASTERS] if _MASTERS in state else state[_MASTERS_BY_PARAMETER])
    if found != num_flats:
        raise ValueError(f"{file} has {found} flat tensors, the model file tells of {num_flats}: two saves are mixed")
    return state


def _flats(
    states: Sequence[Mapping[str, Any]],
    index: int,
    group: Mapping[str, Sequence[int]],
    weights: Mapping[str, Tensor],
    folder: Path,
) -> Iterator[Flat]:
    parts = [state[_MASTERS][index] for state in states]
    cuts = _cuts_that_fit(parts, {name: math.prod(shape) for name, shape in group.items()}, weights)
    if cuts is None:
        raise ValueError(
            f"{folder}: the masters of {next(iter(group))} and others, rounded, do not equal the weights in the model "
            "file: files of two saves are mixed"
        )
    for state, masters, slots in zip(states, parts, cuts, strict=True):
        base = state["base_optimizer_state"]
        kept = base[index] if isinstance(base, list) else base["state"].get(index, {})  # a list: elastic checkpoints
        yield Flat(masters, kept, slots)


def _cuts_that_fit(
    parts: Sequence[Tensor], numels: Mapping[str, int], weights: Mapping[str, Tensor]
) -> list[list[Slot]] | None:
    """Return what lies where in each rank's masters of a group: in the order in which they are the weights' masters."""
    names = list(numels)
    dealt = [name for first in range(len(parts)) for name in names[first :: len(parts)]]
    for order in (names, dealt):
        cuts = cut_end_to_end({name: numels[name] for name in order}, [part.numel() for part in parts])
        if all(
            _fits(part, slot, weights[slot.name]) for part, slots in zip(parts, cuts, strict=True) for slot in slots
        ):
            return cuts
    return None


def _fits(masters: Tensor, slot: Slot, weight: Tensor) -> bool:
    values = weight.reshape(-1)[slot.offset : slot.offset + slot.numel]
    return is_rounded(masters[slot.start : slot.start + slot.numel], values)


def _flat_by_parameter(
    state: Mapping[str, Any], index: int, group: Mapping[str, Sequence[int]], rank: int, num_ranks: int
) -> Flat:
    slots, start = [], 0
    for name, shape in group.items():
        offset, numel, padded = cut_by_parameter(math.prod(shape), rank, num_ranks)
        slots.append(Slot(name, offset, numel, start))
        start += padded
    return Flat(state[_MASTERS_BY_PARAMETER][index], state["optimizer_state_dict"]["state"].get(index, {}), slots)


def _groups_in(base: Any) -> list[dict[str, Any]]:
    if not isinstance(base, list):
        return options_for_torch(base["param_groups"])
    warn_once(
        "the checkpoint was saved with `elastic_checkpoint`, which leaves out the optimizer's settings: learning rate, "
        "betas and so on will be those of the run that resumes"
    )
    return [{} for _ in base]
