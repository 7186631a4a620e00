"""Hands a torch optimizer the fragments this rank updates in place of the model's parameters.

The optimizer object, its group dicts and their other keys stay what they were: schedulers and clients write into those
dicts. Only the lists under "params" change. A rank may hold no part of some parameters, or of a whole optimizer group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from craken.comm import all_reduce_sum
from craken.spec import ShardSpec
from craken.zero.group import MasterFragment, ShardGroup


class Binding:
    """Which fragment stands for which parameter in an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[ShardGroup]) -> None:
        self.optimizer = optimizer
        self._needs_sums = hasattr(optimizer, "sum_over_shards") and bool(groups) and _is_sharded(groups[0])
        self._by_group = [self._fragments_of(group) for group in groups]
        stand_ins = {
            id(group.params[fragment.slot]): fragment
            for group, fragments in zip(groups, self._by_group, strict=True)
            for fragment in fragments
        }
        for options in optimizer.param_groups:
            options["params"] = [self._swap(param, stand_ins) for param in options["params"] if id(param) in stand_ins]
        kept = {id(fragment.tensor) for fragment in stand_ins.values()}
        for leftover in [key for key in optimizer.state if isinstance(key, Tensor) and id(key) not in kept]:
            del optimizer.state[leftover]
        if self._needs_sums:
            axis = groups[0].wire.axis
            optimizer.sum_over_shards = lambda sums: all_reduce_sum(sums, axis, label="layer norms")  # type: ignore[attr-defined]

    def fragments(self, group_index: int) -> list[MasterFragment]:
        """Return the fragments of a shard group that the optimizer updates on this rank."""
        return self._by_group[group_index]

    def named_fragments(self) -> dict[str, MasterFragment]:
        """Return all non-empty fragments by their parameter's name."""
        return {
            fragment.spec.fqn: fragment
            for fragments in self._by_group
            for fragment in fragments
            if fragment.spec.numel or not fragment.spec.global_numel
        }

    def _fragments_of(self, group: ShardGroup) -> list[MasterFragment]:
        if not self._needs_sums:
            return group.fragments
        # every rank lists every parameter, so that rows of the optimizer's norm table line up across ranks
        held = {fragment.slot: fragment for fragment in group.fragments}
        return [held.get(slot) or _empty_fragment(group, slot) for slot in range(len(group.params))]

    def _swap(self, param: nn.Parameter, stand_ins: dict[int, MasterFragment]) -> nn.Parameter:
        fragment = stand_ins[id(param)]
        state = self.optimizer.state.pop(param, None)
        if state:
            self.optimizer.state[fragment.tensor] = {key: _cut(value, fragment) for key, value in state.items()}
        return fragment.tensor


def _is_sharded(group: ShardGroup) -> bool:
    return group.master.numel() != group.layout.padded_numel


def _empty_fragment(group: ShardGroup, slot: int) -> MasterFragment:
    spec = ShardSpec(group.names[slot], group.shapes[slot], 0, 0)
    return MasterFragment(slot, spec, nn.Parameter(group.master[:0]))


def _cut(value: Any, fragment: MasterFragment) -> Any:
    """Return the fragment's part of an optimizer state that has the parameter's shape; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if tuple(value.shape) != fragment.spec.global_shape or value.dim() == 0:
        return value.to(fragment.tensor.device)
    part = value.reshape(-1).narrow(0, fragment.spec.offset, fragment.spec.numel)
    return part.to(fragment.tensor.device, fragment.tensor.dtype).clone().view(fragment.tensor.shape)
