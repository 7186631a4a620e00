"""Takes masters and optimizer states from a stage-0 model file, which names no parameter in them.

With bf16 or fp16 each optimizer group is one flat fp32 tensor, or, of optimizers that the original has no kernel for,
one tensor a parameter. Whose a part of it is, the weights tell: they equal it rounded to their dtype. In fp32 the
optimizer has one state a parameter, in the order of its groups; shapes decide, and where they leave a choice the names
have to be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from craken.checkpoint.original.contents import (
    Flat,
    Slot,
    Trained,
    is_rounded,
    loss_scale_of,
    options_for_torch,
    scalars_for_torch,
    step_of_group,
    with_step,
)
from craken.spec import OPTIMIZER, WEIGHT, ShardSpec

_FLAT, _UNFUSED = "fp32_groups_flat", "fp32_groups"
Names = Sequence[Sequence[str]]  # a list for each optimizer group, in its order
_HOW_TO_NAME = "give --groups FILE: a JSON list with a list of parameter names for each optimizer group, in its order"


def trained_by_all(
    file: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any] | None, names: Names | None
) -> Trained:
    """Return masters and states from a model file's `optimizer`; `weights` are its parameters, each once.

    names: by optimizer group; None finds out. ValueError where that is not certain, or where names do not fit.
    """
    if names is not None:
        _check_names(names, weights)
    if not optimizer:
        return _weights_alone(weights)
    if _FLAT in optimizer or _UNFUSED in optimizer:
        return _from_masters(file, weights, optimizer, names)
    if "param_groups" in optimizer:
        return _from_states(file, weights, optimizer, names)
    raise ValueError(f"{file}: the optimizer's state has the keys {sorted(optimizer)}; expected a torch optimizer's")


def _weights_alone(weights: Mapping[str, Tensor]) -> Trained:
    trained = Trained()
    for name, value in weights.items():
        trained.add_piece(WEIGHT, ShardSpec.whole(name, value.shape), value)
    return trained


def _from_masters(
    file: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], names: Names | None
) -> Trained:
    base, shapes = optimizer["optimizer_state_dict"], {name: tuple(value.shape) for name, value in weights.items()}
    trained = Trained(groups=options_for_torch(base["param_groups"]), loss_scale=loss_scale_of(optimizer))
    left = dict(weights)
    for index, group in enumerate(base["param_groups"]):
        step = step_of_group(base["state"], group["params"])
        given = None if names is None else names[index]
        if _FLAT in optimizer:
            parts = [(optimizer[_FLAT][index], given)]
        else:
            each = optimizer[_UNFUSED][index]
            if given is not None and len(given) != len(each):
                raise ValueError(
                    f"{file}: group {index} has {len(each)} parameters, {len(given)} named; {_HOW_TO_NAME}"
                )
            parts = [(master, given and [given[number]]) for number, master in enumerate(each)]
        for (masters, members), key in zip(parts, group["params"], strict=True):
            may_be = (
                left if _FLAT in optimizer else {n: value for n, value in left.items() if shapes[n] == masters.shape}
            )
            slots = _slots_by_value(file, masters.reshape(-1), may_be if members is None else left, members)
            left = {name: value for name, value in left.items() if name not in {slot.name for slot in slots}}
            trained.add(Flat(masters, with_step(base["state"].get(key, {}), step), slots), shapes, file)
    return trained


def _slots_by_value(
    file: Path, masters: Tensor, weights: Mapping[str, Tensor], names: Sequence[str] | None
) -> list[Slot]:
    """Return whose each part of `masters` [numel] is: in the weights' order, those that equal it once rounded."""
    slots: list[Slot] = []
    also_fit: set[str] = set()
    left, start = list(weights if names is None else names), 0
    while start < masters.numel() and left:
        candidates = left if names is None else left[:1]
        fitting = [name for name in candidates if is_rounded(masters[start:], weights[name])]
        if not fitting:
            break
        slots.append(Slot(fitting[0], 0, weights[fitting[0]].numel(), start))
        also_fit.update(fitting[1:])
        left.remove(fitting[0])
        start += slots[-1].numel
    if masters[start:].count_nonzero() or (names is not None and left):
        raise ValueError(
            f"{file}: the masters from element {start} of {masters.numel()} on, rounded, equal none of the weights "
            f"{', '.join(left[:4])}: the file mixes two states, or --groups names others than those trained"
        )
    if also_fit := also_fit - {slot.name for slot in slots}:
        raise ValueError(
            f"{file}: equal weights leave open whose the states of {sorted(also_fit)[0]} are; {_HOW_TO_NAME}"
        )
    return slots


def _from_states(
    file: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], names: Names | None
) -> Trained:
    groups, states = optimizer["param_groups"], optimizer["state"]
    if names is None:
        names = _names_by_shape(file, weights, groups, states)
    if [len(group) for group in names] != [len(group["params"]) for group in groups]:
        raise ValueError(
            f"{file}: the optimizer's groups have {[len(group['params']) for group in groups]} parameters, those named "
            f"{[len(group) for group in names]}; {_HOW_TO_NAME}"
        )
    trained = Trained(groups=options_for_torch(groups))
    for group, members in zip(groups, names, strict=True):
        step = step_of_group(states, group["params"])
        for index, name in zip(group["params"], members, strict=True):
            state = with_step(states[index], step) if index in states else {}
            _add_whole(trained, file, name, weights[name], state)
    return trained


def _add_whole(trained: Trained, file: Path, name: str, weight: Tensor, state: Mapping[str, Any]) -> None:
    trained.add_piece(WEIGHT, ShardSpec.whole(name, weight.shape), weight)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}
    for key, value in tensors.items():
        if value.shape != weight.shape:
            raise ValueError(
                f"{file}: {key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(weight.shape)}; "
                f"{_HOW_TO_NAME}"
            )
        trained.add_piece(OPTIMIZER + key, ShardSpec.whole(name, weight.shape), value)
    if state:
        trained.scalars[name] = scalars_for_torch({key: value for key, value in state.items() if key not in tensors})


def _names_by_shape(
    file: Path, weights: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]], states: Mapping[int, Any]
) -> list[list[str]]:
    """Return each group's names where there is but one way: all parameters of a shape in one group, in their order."""
    order = list(weights)
    if len(groups) == 1 and len(groups[0]["params"]) == len(order):
        return [order]
    found: list[list[str]] = []
    taken: set[str] = set()
    for group in groups:
        shapes = [_shape_of_state(states.get(index, {})) for index in group["params"]]
        by_shape = {shape: [name for name in order if tuple(weights[name].shape) == shape] for shape in set(shapes)}
        for shape, fitting in by_shape.items():
            if shape is None or len(fitting) != shapes.count(shape) or taken & set(fitting):
                raise ValueError(f"{file} leaves open whose the optimizer's states are; {_HOW_TO_NAME}")
        members = [by_shape[shape].pop(0) for shape in shapes]
        if members != sorted(members, key=order.index):
            raise ValueError(f"{file}: the optimizer's groups are not in the model's order; {_HOW_TO_NAME}")
        taken |= set(members)
        found.append(members)
    return found


def _shape_of_state(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    shapes = [tuple(value.shape) for value in state.values() if isinstance(value, Tensor) and value.dim() > 0]
    return shapes[0] if shapes else None


def _check_names(names: Names, weights: Mapping[str, Tensor]) -> None:
    given = [name for group in names for name in group]
    if unknown := [name for name in given if name not in weights]:
        raise ValueError(
            f"--groups names {', '.join(unknown[:4])}; the checkpoint's parameters are {', '.join(weights)}"
        )
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"--groups names {', '.join(twice[:4])} twice; expected each parameter in one group, once")
