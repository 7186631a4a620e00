"""The sharding engine: one set of verbs, a ZeRO stage is a row of a table."""

from craken.zero.access.attributes import register, register_whole, whole_shape
from craken.zero.access.facade import ShardedOptimizer
from craken.zero.access.full_access import (
    hold_states,
    release_states,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from craken.zero.access.gathered import (
    GatheredParameters,
    external_parameters,
    register_external_parameter,
    take_out,
    unregister_external_parameter,
)
from craken.zero.access.offload_names import ParameterOffload
from craken.zero.autograd import is_in_backward, tensors_in
from craken.zero.binding import Binding
from craken.zero.building.construct import Init, paused
from craken.zero.building.groups import LiveBudget, ShardedLayers, ShardingPlan, is_castable, shard_model
from craken.zero.building.on_device import OnDevice
from craken.zero.building.tiling import TiledLinear
from craken.zero.group import ShardGroup
from craken.zero.hooks import (
    compiler_is_loaded,
    unwatch_attributes,
    watch_gradients,
    watch_loading,
    watch_outputs,
    watch_reads,
    watch_units,
)
from craken.zero.ledger import bytes_by_place
from craken.zero.lifecycle import Lifecycle, Removable
from craken.zero.memory.heap import GrowthTrimmer, keep_freed_memory, return_freed_memory, returning_freed_memory
from craken.zero.memory.link import Link
from craken.zero.memory.placement import HostShare, Place, Placement
from craken.zero.memory.room import mapped_bytes
from craken.zero.memory.shelf import DiskSettings, Kind, Shelf
from craken.zero.optimizer import ShardedStep, Stepping, StepResult
from craken.zero.plans.grouping import CPU_GROUP_BYTES, CUDA_GROUP_BYTES, Budget
from craken.zero.plans.layout import Cut
from craken.zero.plans.leaves import (
    get_z3_leaf_modules,
    mark_leaves,
    set_z3_leaf_module,
    set_z3_leaf_modules,
    set_z3_leaf_modules_by_name,
    set_z3_leaf_modules_by_suffix,
    unset_z3_leaf_modules,
    z3_leaf_module,
    z3_leaf_parameter,
)
from craken.zero.plans.policy import Keep, Policy, policy_for_stage
from craken.zero.plans.units import whole_numel
from craken.zero.reducer import GradientReducer, Occasion
from craken.zero.residence import Ceilings, Residence
from craken.zero.rules import GroupRules, Replication, Sources, Wire
from craken.zero.swapping import StateSwap, SwapSettings
from craken.zero.unfinished import can_load, gradient_state, load_gradient_state
from craken.zero.weights import ZeroParamStatus

__all__ = [
    "CPU_GROUP_BYTES",
    "CUDA_GROUP_BYTES",
    "Binding",
    "Budget",
    "Ceilings",
    "Cut",
    "DiskSettings",
    "GatheredParameters",
    "GradientReducer",
    "GroupRules",
    "GrowthTrimmer",
    "HostShare",
    "Init",
    "Keep",
    "Kind",
    "Lifecycle",
    "Link",
    "LiveBudget",
    "Occasion",
    "OnDevice",
    "ParameterOffload",
    "Place",
    "Placement",
    "Policy",
    "Removable",
    "Replication",
    "Residence",
    "ShardGroup",
    "ShardedLayers",
    "ShardedOptimizer",
    "ShardedStep",
    "ShardingPlan",
    "Shelf",
    "Sources",
    "StateSwap",
    "StepResult",
    "Stepping",
    "SwapSettings",
    "TiledLinear",
    "Wire",
    "ZeroParamStatus",
    "bytes_by_place",
    "can_load",
    "compiler_is_loaded",
    "external_parameters",
    "get_z3_leaf_modules",
    "gradient_state",
    "hold_states",
    "is_castable",
    "is_in_backward",
    "keep_freed_memory",
    "load_gradient_state",
    "mapped_bytes",
    "mark_leaves",
    "paused",
    "policy_for_stage",
    "register",
    "register_external_parameter",
    "register_whole",
    "release_states",
    "return_freed_memory",
    "returning_freed_memory",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "shard_model",
    "take_out",
    "tensors_in",
    "unregister_external_parameter",
    "unset_z3_leaf_modules",
    "unwatch_attributes",
    "watch_gradients",
    "watch_loading",
    "watch_outputs",
    "watch_reads",
    "watch_units",
    "whole_numel",
    "whole_shape",
    "z3_leaf_module",
    "z3_leaf_parameter",
]
