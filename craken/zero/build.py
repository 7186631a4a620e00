"""Turns a model's parameters into shard groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from craken.zero.group import GroupRules, ShardGroup, Wire
from craken.zero.grouping import Budget, ParamFacts, plan_groups
from craken.zero.layout import Cut


def build_groups(
    named_params: Sequence[tuple[str, nn.Parameter]],
    *,
    cuts: Mapping[int, Cut],
    rules: GroupRules,
    wire: Wire,
    budget: Budget,
) -> list[ShardGroup]:
    """Collective over the axis: move trainable parameters into shard groups, in order.

    cuts: by id of a parameter, how it may be cut (default PACKED). budget: how large a group may be.
    """
    dtypes = [_compute_dtype(param, rules) for _, param in named_params]
    facts = [
        ParamFacts(name, param.numel(), str(dtype), dtype.itemsize, cuts.get(id(param), Cut.PACKED))
        for (name, param), dtype in zip(named_params, dtypes, strict=True)
    ]
    groups = []
    for indices in plan_groups(facts, world_size=wire.axis.size, budget=budget):
        first = indices[0]
        group_rules = dataclasses.replace(rules, cut=facts[first].cut)
        members = [named_params[index] for index in indices]
        names, params = [name for name, _ in members], [param for _, param in members]
        groups.append(ShardGroup(names, params, dtypes[first], group_rules, wire))
    return groups


def _compute_dtype(param: nn.Parameter, rules: GroupRules) -> torch.dtype:
    compute = rules.precision.compute
    return compute if compute is not None and param.is_floating_point() else param.dtype
