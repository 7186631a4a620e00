"""The sharding engine: one set of verbs, a ZeRO stage is a row of a table."""

from craken.zero.binding import Binding
from craken.zero.build import build_groups
from craken.zero.facade import ShardedOptimizer
from craken.zero.group import GroupRules, ShardGroup, Wire
from craken.zero.grouping import CPU_GROUP_BYTES, CUDA_GROUP_BYTES, Budget
from craken.zero.hooks import is_in_backward, tensors_in, watch_gradients, watch_loading, watch_outputs
from craken.zero.layout import Cut
from craken.zero.optimizer import ShardedStep, Stepping, StepResult
from craken.zero.policy import Keep, Policy, policy_for_stage
from craken.zero.reducer import GradientReducer

__all__ = [
    "CPU_GROUP_BYTES",
    "CUDA_GROUP_BYTES",
    "Binding",
    "Budget",
    "Cut",
    "GradientReducer",
    "GroupRules",
    "Keep",
    "Policy",
    "ShardGroup",
    "ShardedOptimizer",
    "ShardedStep",
    "StepResult",
    "Stepping",
    "Wire",
    "build_groups",
    "is_in_backward",
    "policy_for_stage",
    "tensors_in",
    "watch_gradients",
    "watch_loading",
    "watch_outputs",
]
