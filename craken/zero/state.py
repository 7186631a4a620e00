"""Master weights and optimizer states as named pieces with their place in the full tensor, out and back in.

A piece is this rank's part of one tensor. With the optimizer FULL every rank holds everything; each then hands out only
its own 1/N, so that together the ranks write every element once, and reads back all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from craken.spec import OPTIMIZER, WEIGHT, ShardSpec
from craken.zero.binding import Binding
from craken.zero.group import MasterFragment, ShardGroup

Named = tuple[str, ShardSpec, Tensor]


def pieces(binding: Binding | None, groups: Sequence[ShardGroup]) -> Iterator[Named]:
    """Yield (kind, spec, tensor [spec.numel]) for each master weight and tensor state this rank answers for."""
    for index, group in enumerate(groups):
        mine = {piece.slot: (piece.param_offset, piece.numel) for piece in group.layout.fragments(group.wire.axis.rank)}
        for fragment in binding.fragments(index) if binding else group.fragments:
            offset, numel = mine.get(fragment.slot, (0, 0))
            if numel == 0:
                continue
            spec = ShardSpec(fragment.spec.fqn, fragment.spec.global_shape, offset, numel)
            start = offset - fragment.spec.offset
            yield WEIGHT, spec, fragment.tensor.detach().reshape(-1).narrow(0, start, numel)
            for key, value in tensor_states(binding, fragment):
                yield OPTIMIZER + key, spec, value.reshape(-1).narrow(0, start, numel)


def frozen_pieces(groups: Sequence[ShardGroup]) -> Iterator[tuple[ShardSpec, Tensor]]:
    """Yield (spec, tensor [spec.numel]) for each part of a frozen weight that this rank keeps a shard of."""
    for group in groups:
        for fragment in group.fragments:
            if fragment.spec.numel:
                yield fragment.spec, fragment.tensor.detach().view(-1)


def other_states(
    binding: Binding, groups: Sequence[ShardGroup]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Return what the optimizer keeps besides tensors of a parameter's shape, by name: everyone's, and this rank's own.

    Step counts and the like are the same on all ranks: the one that holds a parameter's first element names them.
    Tensors of other shapes that belong to a part of a parameter (scales of quantised states) are that part's alone.
    """
    first = {
        group.names[piece.slot]
        for group in groups
        for piece in group.layout.fragments(group.wire.axis.rank)
        if piece.param_offset == 0
    }
    everyones: dict[str, dict[str, Any]] = {}
    own: dict[str, dict[str, Any]] = {}
    for name, fragment in binding.named_fragments().items():
        state, spec = binding.optimizer.state.get(fragment.tensor, {}), fragment.spec
        shaped = dict(tensor_states(binding, fragment))
        rest = {key: value for key, value in state.items() if key not in shaped}
        parts = {key: value for key, value in rest.items() if isinstance(value, Tensor) and value.numel() > 1}
        mine = parts if spec.numel < spec.global_numel else {}
        if mine:
            own[name] = {"offset": spec.offset, "numel": spec.numel, "states": mine}
        if state and (name in first or not spec.global_numel):
            everyones[name] = {key: value for key, value in rest.items() if key not in mine}
    return everyones, own


def class_names(binding: Binding) -> list[str]:
    """Return the name of the optimizer's class, and of those that it is a kind of."""
    kinds = type(binding.optimizer).__mro__
    return [kind.__name__ for kind in kinds[: kinds.index(torch.optim.Optimizer)]]


def group_options(binding: Binding) -> list[dict[str, Any]]:
    """Return each optimizer group's settings without its parameters."""
    return [
        {key: value for key, value in options.items() if key != "params"} for options in binding.optimizer.param_groups
    ]


def load_weights(groups: Sequence[ShardGroup], read: Callable[[ShardSpec, Tensor], None]) -> None:
    """Fill this rank's masters through `read(spec, out)`; `refresh` must follow on all ranks."""
    for group in groups:
        for fragment in group.fragments:
            if fragment.spec.numel:
                read(fragment.spec, fragment.tensor.detach().view(-1))


def refresh(groups: Sequence[ShardGroup]) -> None:
    """Collective: bring every rank's parameters up to date with the masters."""
    for group in groups:
        for arrival in group.refresh():
            arrival.wait()


def empty_state(fragment: MasterFragment, key: str) -> Tensor:
    """Return undefined values beside a fragment's master."""
    return torch.empty_like(fragment.tensor, requires_grad=False)


def check_optimizer(binding: Binding, saved: dict[str, Any]) -> None:
    """Raise ValueError unless the optimizer is of a kind with the one that was saved, with as many groups."""
    optimizer, names = binding.optimizer, class_names(binding)
    # checkpoints that were imported, and older ones, do not say
    if "class" in saved and not set(names) & set(saved["class"]):
        raise ValueError(
            f"the checkpoint has the states of {saved['class'][0]}, this optimizer is {names[0]}; build it as it was, "
            "or pass load_optimizer_states=False"
        )
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has {len(saved['groups'])} optimizer groups, this optimizer has "
            f"{len(optimizer.param_groups)}; build it as it was when the checkpoint was saved"
        )


def load_optimizer(
    binding: Binding,
    kinds_of: Callable[[str], Sequence[str]],
    read: Callable[[str, ShardSpec, Tensor], None],
    saved: dict[str, Any],
    new_state: Callable[[MasterFragment, str], Tensor] = empty_state,
) -> None:
    """Fill the optimizer's states; `kinds_of(fqn)` names the kinds of pieces that were saved for a parameter.

    saved: its "groups" and everyone's "scalars", as `check_optimizer` has seen them. new_state: makes the tensor for a
    fragment's state of a key, where it is to rest.
    """
    optimizer = binding.optimizer
    for options, others in zip(optimizer.param_groups, saved["groups"], strict=True):
        options.update(others)
    optimizer.state.clear()
    for name, fragment in binding.named_fragments().items():
        if name not in saved["scalars"]:
            continue
        state = {key: _copied(value, fragment) for key, value in saved["scalars"][name].items()}
        for kind in kinds_of(name):
            if kind.startswith(OPTIMIZER):
                key = kind.removeprefix(OPTIMIZER)
                state[key] = new_state(fragment, key)
                read(kind, fragment.spec, state[key].view(-1))
        optimizer.state[fragment.tensor] = state


def load_own_states(binding: Binding, saved: dict[str, dict[str, Any]]) -> None:
    """Take back what `other_states` called this rank's own; ValueError unless it has the same parts of parameters."""
    fragments = binding.named_fragments()
    for name, part in saved.items():
        spec = fragments[name].spec if name in fragments else None
        if spec is None or (spec.offset, spec.numel) != (part["offset"], part["numel"]):
            raise ValueError(
                f"{', '.join(part['states'])} of {name} belong to the part that a rank had when they were saved; load "
                "them on as many ranks, at the same stage and bucket sizes, or pass load_optimizer_states=False"
            )
        for key, value in part["states"].items():
            binding.optimizer.state[fragments[name].tensor][key] = _copied(value, fragments[name])


def tensor_states(binding: Binding | None, fragment: MasterFragment) -> list[tuple[str, Tensor]]:
    """Return the states that have the shape of a fragment, by key."""
    if binding is None:
        return []
    state = binding.optimizer.state.get(fragment.tensor, {})
    return [
        (key, value)
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == fragment.tensor.shape and value.dim() > 0
    ]


def _copied(value: Any, fragment: MasterFragment) -> Any:
    # fused kernels read step counts on the parameter's device
    return value.to(fragment.tensor.device, copy=True) if isinstance(value, Tensor) else value
