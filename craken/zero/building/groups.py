"""Turns a model's parameters into shard groups, and at stage 3 into units that bring their weights together."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from craken.zero.access.gathered import take_out
from craken.zero.building.quantised_layers import keep_from_repacking, must_stay_whole
from craken.zero.group import ShardGroup
from craken.zero.memory.placement import HostShare, Place
from craken.zero.plans.grouping import Budget, ParamFacts, plan_groups
from craken.zero.plans.layout import Cut
from craken.zero.plans.leaves import get_z3_leaf_modules, note_leaf_parameters
from craken.zero.plans.policy import policy_for_stage
from craken.zero.plans.units import Unit, choose_persistent, plan_units, whole_numel
from craken.zero.rules import GroupRules, Wire

Named = tuple[str, nn.Parameter]


@dataclass(frozen=True)
class ShardingPlan:
    """How groups are made: their rules, what they talk through, their size, by id how parameters may be cut, and the
    share of them whose states rest where the placement says.
    """

    rules: GroupRules
    wire: Wire
    frozen_wire: Wire
    budget: Budget
    cuts: Mapping[int, Cut]
    share: HostShare


@dataclass(frozen=True)
class LiveBudget:
    """At stage 3, in elements: what a unit may hold, and up to which size, and how many, parameters always stay whole.

    Modules whose layers have at most `small_layer_numel` elements on average are units whatever their size.
    """

    unit_numel: int
    persistent_numel: int
    persistent_total: int = sys.maxsize
    small_layer_numel: int = 0


@dataclass(frozen=True)
class ShardedLayers:
    """A model's groups. `frozen` and `units` are empty below stage 3; `groups_of` goes by id of a unit's module."""

    groups: list[ShardGroup]
    frozen: list[ShardGroup]
    units: list[Unit]
    groups_of: dict[int, list[ShardGroup]]


def shard_model(model: nn.Module, trained: Sequence[Named], plan: ShardingPlan, live: LiveBudget) -> ShardedLayers:
    """Collective over the axis: move `trained`, and at stage 3 the large frozen parameters too, into shard groups.

    Groups of trained parameters come in the order of the model, those that stay whole at stage 3 after all others.
    """
    keep_from_repacking(model)
    if not plan.rules.policy.frees_params:
        return ShardedLayers(build_groups(trained, plan), [], [], {})
    names = {id(param): name for name, param in trained}
    stays_whole = choose_persistent(
        model.parameters(), max_numel=live.persistent_numel, max_total=live.persistent_total
    )
    stays_whole = {*stays_whole, *(id(param) for param in model.parameters() if must_stay_whole(param))}
    small = [named for named in trained if id(named[1]) in stays_whole]
    leaves = get_z3_leaf_modules(model)
    note_leaf_parameters(leaves)
    units = plan_units(model, max_numel=live.unit_numel, leaves=leaves, small_layer_numel=live.small_layer_numel)
    layers = ShardedLayers([], [], units, {})
    frozen_rules = dataclasses.replace(plan.rules, trains=False)
    frozen_plan = dataclasses.replace(plan, rules=frozen_rules, wire=plan.frozen_wire)
    for unit in units:
        large = [named for named in unit.params if id(named[1]) not in stays_whole]
        mine = build_groups([(names[id(param)], param) for _, param in large if id(param) in names], plan)
        others = build_groups([(name, param) for name, param in large if id(param) not in names], frozen_plan)
        layers.groups.extend(mine)
        layers.frozen.extend(others)
        layers.groups_of[id(unit.module)] = mine + others
    if held := [_weights_bytes(mine) for mine in layers.groups_of.values() if mine]:
        plan.wire.shelf.idle_pages.limit = statistics.median_low(held)
    stays = dataclasses.replace(plan.rules, policy=policy_for_stage(2))
    layers.groups.extend(build_groups(small, dataclasses.replace(plan, rules=stays)))
    return layers


def build_groups(named_params: Sequence[Named], plan: ShardingPlan) -> list[ShardGroup]:
    """Collective over the axis: move parameters into shard groups, in order."""
    dtypes = [_compute_dtype(param, plan.rules) for _, param in named_params]
    facts = [
        ParamFacts(name, whole_numel(param), str(dtype), dtype.itemsize, plan.cuts.get(id(param), Cut.PACKED))
        for (name, param), dtype in zip(named_params, dtypes, strict=True)
    ]
    groups = []
    for indices in plan_groups(facts, world_size=plan.wire.axis.size, budget=plan.budget):
        first = indices[0]
        rules = dataclasses.replace(plan.rules, cut=facts[first].cut)
        if rules.trains and not plan.share.leaves(sum(facts[index].numel for index in indices)):
            placement = dataclasses.replace(rules.placement, states=Place.DEVICE)
            rules = dataclasses.replace(rules, placement=placement)
        members = [named_params[index] for index in indices]
        take_out([param for _, param in members])
        names, params = [name for name, _ in members], [param for _, param in members]
        groups.append(ShardGroup(names, params, dtypes[first], rules, plan.wire))
    return groups


def is_castable(tensor: torch.Tensor) -> bool:
    """Say whether a parameter's dtype may be changed: floating, and not packed quantised data."""
    return tensor.is_floating_point() and not hasattr(tensor, "quant_state") and tensor.element_size() > 1


def _compute_dtype(param: nn.Parameter, rules: GroupRules) -> torch.dtype:
    compute = rules.precision.compute
    return compute if compute is not None and is_castable(param) else param.dtype


def _weights_bytes(groups: Sequence[ShardGroup]) -> int:
    return sum(group.layout.padded_numel * group.dtype.itemsize for group in groups)
