"""Masters, gradients and optimizer states of one parameter, whole or this rank's part, read and written by users.

    rank 0's fragment  rank 1's fragment        each rank holds a range of the flattened parameter, or nothing of it
         |-------- all-gather --------|         get_full: every rank has the whole, in fp32
         |------- everyone's own part -|        set_full: no communication, every rank is given the whole

The names are DeepSpeed's. They work at every stage; below stage 1 each rank holds everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from craken.comm import all_reduce_sum, gather_objects
from craken.zero.binding import Binding
from craken.zero.flat import check_has_memory
from craken.zero.group import MasterFragment, ShardGroup
from craken.zero.plans.layout import Fragment
from craken.zero.plans.policy import Keep

_HELD = "_craken_held"


@dataclass(eq=False)
class _Held:
    """What an engine holds of a parameter that it trains. `fragment` is None where this rank has no part of it."""

    group: ShardGroup
    slot: int
    fragment: MasterFragment | None
    optimizer: torch.optim.Optimizer
    grad_divisor: WeakMethod[Callable[[], float]]

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled parameter is an ordinary one


def hold_states(
    module: nn.Module, groups: Sequence[ShardGroup], binding: Binding | None, grad_divisor: Callable[[], float]
) -> None:
    """Make what an engine holds of a module's parameters known here. `grad_divisor`, a method, is held weakly."""
    for param in module.parameters():
        param.__dict__.pop(_HELD, None)
    for index, group in enumerate(groups if binding is not None else ()):
        assert binding is not None
        mine = {fragment.slot: fragment for fragment in binding.fragments(index) if fragment.spec.numel}
        for slot, param in enumerate(group.params):
            held = _Held(group, slot, mine.get(slot), binding.optimizer, WeakMethod(grad_divisor))
            setattr(param, _HELD, held)


def release_states(groups: Sequence[ShardGroup]) -> None:
    """Forget what an engine held; parameters that another engine has taken over since stay known."""
    for group in groups:
        for param in group.params:
            held = param.__dict__.get(_HELD)
            if held is not None and held.group is group:
                del param.__dict__[_HELD]


# --- whole ------------------------------------------------------------------------------------------------------------


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return the whole master weight in fp32. Collective; None for a parameter that no engine trains."""
    held = _held(param)
    return None if held is None else _gather(held, _master(held))


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Return the whole gradient in fp32: the mean over ranks, loss scale divided out. Collective.

    After a step, the one that it took, clipped, until the next forward, backward or save. None where there is none:
    before a backward, at stages 0 and 1 before the boundary's, after a step that was skipped, and after one whose
    states have left the device.
    """
    held = _held(param)
    return None if held is None or not _has_grad(held) else _gather(held, _grad(held))


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return an optimizer state of the parameter's shape (`exp_avg`, `exp_avg_sq`, ...) whole, in fp32. Collective.

    A state of another shape, for instance a step count, comes as it is. None where the optimizer has no such state.
    """
    held = _held(param)
    if held is None:
        return None
    mine = _state(held, optim_state_key)
    is_fragment = mine is not None and held.fragment is not None and mine.shape == held.fragment.tensor.shape
    others = gather_objects(None if is_fragment or mine is None else mine.cpu(), held.group.wire.axis)
    scalar: Tensor | None = next((value for value in others if value is not None), None)
    if scalar is not None:
        return scalar
    has_any = any(gather_objects(is_fragment, held.group.wire.axis))
    return _gather(held, mine) if has_any else None


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Make `value`, whole and the same on every rank, the master weight and what forwards use. Every rank calls it."""
    held = _writable(param, value, "safe_set_full_fp32_param")
    held.group.write(held.slot, value)


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Make `value`, whole and the same on every rank, the mean gradient the next step takes. Every rank calls it."""
    held = _writable(param, value, "safe_set_full_grad")
    _check_has_grad(held)
    _set_grad(held, _own_range(held, value))


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Make `value`, whole and the same on every rank, an optimizer state that is there. Every rank calls it."""
    held = _writable(param, value, "safe_set_full_optimizer_state")
    state = _state(held, optim_state_key)
    if held.fragment is not None:
        _check_state(state, held, optim_state_key).view(-1).copy_(_own_range(held, value))


# --- this rank's part -------------------------------------------------------------------------------------------------


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return this rank's part [n] of the master weight, n between 0 and all elements; the live tensor, not a copy."""
    held = _held(param)
    return None if held is None else _flat(_master(held))


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """Return this rank's part [n] of the mean gradient in fp32; None where there is none."""
    held = _held(param)
    return None if held is None or not _has_grad(held) else _flat(_grad(held))


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return this rank's part [n] of an optimizer state, the live tensor; None where there is no such state."""
    held = _held(param)
    state = None if held is None else _state(held, optim_state_key)
    return None if state is None else _flat(state)


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Make `value` [n] this rank's part of the master weight and of the weights. Collective: every rank calls it."""
    held = _local(param, value, "safe_set_local_fp32_param")
    whole = _gather(held, value.to(held.group.master.dtype))
    held.group.write(held.slot, whole)


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Make `value` [n] this rank's part of the mean gradient that the next step takes."""
    held = _local(param, value, "safe_set_local_grad")
    _check_has_grad(held)
    _set_grad(held, value.reshape(-1))


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Make `value` [n] this rank's part of an optimizer state that is there."""
    held = _local(param, value, "safe_set_local_optimizer_state")
    if held.fragment is not None:
        _check_state(_state(held, optim_state_key), held, optim_state_key).view(-1).copy_(value.reshape(-1))


# --- parts ------------------------------------------------------------------------------------------------------------


def _held(param: Any) -> _Held | None:
    return getattr(param, _HELD, None) if isinstance(param, nn.Parameter) else None


def _piece(held: _Held) -> Fragment | None:
    """Return where this rank's part lies in the flat buffers of its group."""
    return next((piece for piece in held.group.pieces() if piece.slot == held.slot), None)


def _master(held: _Held) -> Tensor | None:
    if held.fragment is None:
        return None
    check_has_memory(held.fragment.tensor)
    return held.fragment.tensor.detach()


def _state(held: _Held, key: str) -> Tensor | None:
    if held.fragment is None:
        return None
    state = held.optimizer.state.get(held.fragment.tensor, {}).get(key)
    if not isinstance(state, Tensor):
        return None
    check_has_memory(state)
    return state


def _has_grad(held: _Held) -> bool:
    return held.group.gradients.has_reduced or held.group.gradients.taken is not None


def _grad(held: _Held) -> Tensor | None:
    """Return this rank's part of the mean gradient in fp32; collective over replicas that have not added theirs."""
    gradients = held.group.gradients
    if not gradients.has_reduced:
        assert gradients.taken is not None
        values, divisor = gradients.taken
        part = _part_of(held, values)
        return None if part is None else part.float() / divisor
    part = _part_of(held, gradients.reduced)
    replication = held.group.wire.replication
    total = part if part is None else part.float()
    if replication is not None and held.group.gradients.awaits_replicas:
        empty = torch.empty(0, device=held.group.wire.device)
        total = all_reduce_sum(empty if total is None else total, replication.replicas.axis, label="a gradient")
    return None if total is None else total / _divisor(held)


def _set_grad(held: _Held, value: Tensor) -> None:
    part = _part_of(held, held.group.gradients.reduced)
    if part is not None:
        terms = held.group.wire.num_replicas if held.group.gradients.awaits_replicas else 1  # that are still added up
        part.copy_(value * (_divisor(held) / terms))
        held.group.gradients.sum_changed()


def _part_of(held: _Held, summed: Tensor) -> Tensor | None:
    piece = _piece(held)
    if piece is None or held.fragment is None:
        return None
    return summed.narrow(0, piece.shard_offset, piece.numel)


def _divisor(held: _Held) -> float:
    divisor = held.grad_divisor()
    if divisor is None:
        raise RuntimeError("the engine that held this parameter's gradient is gone")
    return divisor()


def _own_range(held: _Held, value: Tensor) -> Tensor:
    piece = _piece(held)
    start, numel = (0, 0) if piece is None else (piece.param_offset, piece.numel)
    return value.detach().reshape(-1).narrow(0, start, numel)


def _flat(part: Tensor | None) -> Tensor:
    return torch.empty(0) if part is None else part.view(-1)


def _gather(held: _Held, part: Tensor | None) -> Tensor:
    """Collective over the axis: return the whole, in the master's dtype, from everyone's parts."""
    group = held.group
    shape = group.shapes[held.slot]
    dtype = group.master.dtype
    if group.policy.optimizer is Keep.FULL:
        assert part is not None
        return part.to(group.wire.device, dtype, copy=True).view(shape)
    axis = group.wire.axis
    pieces = [next((p for p in group.layout.fragments(rank) if p.slot == held.slot), None) for rank in range(axis.size)]
    numel = max(piece.numel for piece in pieces if piece is not None) if any(pieces) else 0
    box = torch.zeros(axis.size, numel, dtype=dtype, device=group.wire.device)
    if part is not None:
        box[axis.rank, : part.numel()] = part.reshape(-1)
    group.wire.weights.exact.all_gather(box.view(-1), label=f"{group.names[held.slot]} (read)").wait()
    whole = torch.empty(math.prod(shape), dtype=dtype, device=group.wire.device)
    for piece, values in zip(pieces, box, strict=True):
        if piece is not None:
            whole.narrow(0, piece.param_offset, piece.numel).copy_(values[: piece.numel])
    return whole.view(shape)


# --- checks -----------------------------------------------------------------------------------------------------------


def _trained(param: nn.Parameter, who: str) -> _Held:
    held = _held(param)
    if held is None:
        raise ValueError(f"{who}: no engine trains this parameter (of shape {tuple(param.shape)})")
    return held


def _writable(param: nn.Parameter, value: Tensor, who: str) -> _Held:
    held = _trained(param, who)
    if tuple(value.shape) != held.group.shapes[held.slot]:
        raise ValueError(
            f"{who}: expected a value of shape {held.group.shapes[held.slot]}, the whole parameter's, got "
            f"{tuple(value.shape)}"
        )
    return held


def _local(param: nn.Parameter, value: Tensor, who: str) -> _Held:
    held = _trained(param, who)
    expected = 0 if held.fragment is None else held.fragment.spec.numel
    if value.numel() != expected:
        raise ValueError(f"{who}: this rank keeps {expected} elements of the parameter, got {value.numel()}")
    return held


def _check_has_grad(held: _Held) -> None:
    if not held.group.gradients.has_reduced:
        raise RuntimeError(
            "there is no gradient to set: expected a backward that reduced gradients since the last step (at stages 0 "
            "and 1 the boundary's)"
        )


def _check_state(state: Tensor | None, held: _Held, key: str) -> Tensor:
    if state is None:
        known = [] if held.fragment is None else sorted(held.optimizer.state.get(held.fragment.tensor, {}))
        raise ValueError(
            f"the optimizer has no state {key!r} for this parameter; it has {known} (after its first step)"
        )
    return state
