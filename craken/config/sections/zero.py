"""The `zero_optimization` section: which model states are sharded, where they live, and the size ceilings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator

from craken.config.section import Section
from craken.config.values import (
    Count,
    FilePath,
    Flag,
    Fraction,
    Mismatch,
    PositiveCount,
    Texts,
    choice,
    to_whole,
    whole,
)

NOTHING_SHARDED = 0
PARAMETERS_SHARDED = 3

OffloadDevice = Annotated[str, choice("none", "cpu", "nvme")]


def _stage(value: Any) -> int:
    expected = "0 (off), 1 (optimizer states), 2 (+ gradients) or 3 (+ parameters)"
    stage = to_whole(value, 0, expected)
    if stage > PARAMETERS_SHARDED:
        raise Mismatch(expected)
    return stage


def _auto_or_steps(value: Any) -> int | str:
    return "auto" if value == "auto" else to_whole(value, 1, 'a whole number >= 1 or "auto"')


class OffloadParam(Section):
    """Where sharded parameters rest between uses; sizes in elements."""

    device: OffloadDevice = "none"
    nvme_path: FilePath | None = None
    buffer_count: PositiveCount = 5
    buffer_size: Count = 100_000_000
    max_in_cpu: Count = 1_000_000_000
    pin_memory: Flag = True


class OffloadOptimizer(Section):
    """Where optimizer states rest, and the share of the update that runs on the host."""

    device: OffloadDevice = "none"
    nvme_path: FilePath | None = None
    buffer_count: PositiveCount = 4
    pin_memory: Flag = True
    pipeline_read: Flag = True
    pipeline_write: Flag = True
    fast_init: Flag = False
    ratio: Fraction = 1.0
    super_offload: Flag = False
    cpuadam_cores_perc: Fraction = 0.8


class ZenFlow(Section):
    """Selective gradient updates beside offload."""

    topk_ratio: Fraction = 0.1
    select_strategy: Annotated[str, choice("auto", "step", "epoch")] = "auto"
    select_interval: Annotated[int | str, PlainValidator(_auto_or_steps)] = "auto"
    update_interval: Annotated[int | str, PlainValidator(_auto_or_steps)] = "auto"
    overlap_step: Flag = False
    offload: Flag = False
    auto_ratio: Fraction = 0.99
    full_warm_up_rounds: Count = 0
    pt_reserved_cores_perc: Fraction = 0.5
    steps_per_epoch: PositiveCount | None = None


class LeafModule(Section):
    """Modules whose parameters are gathered as one unit at stage 3."""

    classes: Texts = Field(default_factory=list)
    names: Texts = Field(default_factory=list)
    name_suffixes: Texts = Field(default_factory=list)


class LocoParam(Section):
    """Error feedback for quantised gradients."""

    err_beta: Fraction = 0.8
    reset_T: PositiveCount = 1024


class ZeroOptimization(Section):
    """ZeRO stage and its settings; bucket sizes are ceilings in elements."""

    aliases: ClassVar[Mapping[str, str]] = {
        "prefetch_bucket_size": "stage3_prefetch_bucket_size",
        "param_persistence_threshold": "stage3_param_persistence_threshold",
        "model_persistence_threshold": "stage3_model_persistence_threshold",
        "max_live_parameters": "stage3_max_live_parameters",
        "max_reuse_distance": "stage3_max_reuse_distance",
        "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
        "module_granularity_threshold": "stage3_module_granularity_threshold",
        "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
        "allgather_sequential": "stage3_allgather_sequential",
    }

    stage: Annotated[int, PlainValidator(_stage)] = 0
    contiguous_gradients: Flag = True
    reduce_scatter: Flag = True
    reduce_bucket_size: PositiveCount = 500_000_000
    use_multi_rank_bucket_allreduce: Flag = True
    allgather_partitions: Flag = True
    allgather_bucket_size: Count = 500_000_000
    overlap_comm: Flag | None = None
    load_from_fp32_weights: Flag = True
    elastic_checkpoint: Flag = False
    offload_param: OffloadParam = Field(default_factory=OffloadParam)
    offload_optimizer: OffloadOptimizer = Field(default_factory=OffloadOptimizer)
    zenflow: ZenFlow | None = None
    sub_group_size: Count = 1_000_000_000
    cpu_offload: Flag = False
    cpu_offload_param: Flag = False
    cpu_offload_use_pin_memory: Flag = False
    stage3_prefetch_bucket_size: Count = 50_000_000
    stage3_param_persistence_threshold: Count = 100_000
    stage3_model_persistence_threshold: Count = sys.maxsize
    stage3_max_live_parameters: Count = 1_000_000_000
    stage3_max_reuse_distance: Count = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: Flag = False
    stage3_module_granularity_threshold: Count = 0
    stage3_use_all_reduce_for_fetch_params: Flag = False
    stage3_allgather_sequential: Flag = False
    ignore_unused_parameters: Flag = True
    legacy_stage1: Flag = False
    round_robin_gradients: Flag = False
    zero_hpz_partition_size: Count = 1
    zero_quantized_weights: Flag = False
    zero_quantized_nontrainable_weights: Flag = False
    zero_quantized_gradients: Flag = False
    zeropp_loco_param: LocoParam | None = None
    mics_shard_size: Annotated[int, whole(-1)] = -1
    mics_hierarchical_params_gather: Flag = False
    memory_efficient_linear: Flag = True
    pipeline_loading_checkpoint: Flag = False
    override_module_apply: Flag = True
    log_trace_cache_warnings: Flag = False
    enable_sanity_checks: Flag = False
    save_muon_momentum_buffer_in_memory: Flag = False
    leaf_module: LeafModule = Field(default_factory=LeafModule)
