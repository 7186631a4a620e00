"""Sections that split a model over ranks in other ways than ZeRO, and the compiler's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from craken.config.section import Section
from craken.config.values import Count, Counts, Flag, Number, Object, PositiveCount, Text, Texts, choice


class Pipeline(Section):
    """Stages of layers that pass micro-batches on."""

    stages: PositiveCount | None = None
    partition: Text = "best"
    seed_layers: Flag = False
    activation_checkpoint_interval: Count = 0
    pipe_partitioned: Flag = True
    grad_partitioned: Flag = True
    use_reentrant: Flag = True


class TensorParallelGroup(Section):
    """The ranks that share one layer's matrices; `mpu` and `tp_group` are objects given from Python."""

    tp_size: PositiveCount = 1
    tp_grain_size: PositiveCount = 1
    mpu: Any = None
    tp_group: Any = None


class TensorParallel(Section):
    """Tensor parallelism; `autotp_size` 0 means off."""

    aliases: ClassVar[Mapping[str, str]] = {"tp": "tensor_parallel", "kernel_inject": "replace_with_kernel_inject"}

    dtype: Any = None
    autotp_size: Count = 0
    tp_overlap_comm: Flag = False
    tensor_parallel: TensorParallelGroup = Field(default_factory=TensorParallelGroup)
    injection_policy_tuple: Any = None
    partition_config: Object | None = None
    preset_model: Text | None = None
    keep_module_on_host: Flag = False
    replace_with_kernel_inject: Flag = False


class ExpertParallel(Section):
    """Mixture-of-experts layers spread over ranks."""

    enabled: Flag = False
    autoep_size: PositiveCount = 1
    expert_tensor_parallel_size: PositiveCount = 1
    validate_folding_routing: Flag = False
    preset_model: Text | None = None
    moe_layer_pattern: Text | None = None
    expert_pattern: Text | None = None
    router_pattern: Text | None = None
    use_grouped_mm: Flag = True
    disable_triton_grouped_mm: Flag = False
    route_norm: Flag | None = None
    route_scale: Number = 1.0
    score_apply: Annotated[str, choice("auto", "pre", "post")] = "auto"
    combine_impl: Annotated[str, choice("auto", "weighted_sum", "legacy_bmm")] = "auto"
    num_expert_groups: PositiveCount | None = None
    num_limited_groups: PositiveCount | None = None
    score_func: Annotated[str, choice("auto", "softmax", "sigmoid")] = "auto"
    top_k: PositiveCount | None = None
    load_balance_coeff: Number | None = None
    routed_scaling_factor: Number | None = None
    expert_w1: Text | None = None
    expert_w2: Text | None = None
    expert_w3: Text | None = None
    num_experts_attr: Text | None = None
    top_k_attr: Text | None = None
    has_shared_experts: Flag | None = None
    shared_experts_pattern: Text | None = None
    shared_experts_gate_pattern: Text | None = None


class HybridEngine(Section):
    """Generation and training with one copy of the weights."""

    enabled: Flag = False
    max_out_tokens: PositiveCount = 512
    inference_tp_size: PositiveCount = 1
    release_inference_cache: Flag = False
    pin_parameters: Flag = True
    tp_gather_partition_size: PositiveCount = 8
    enable_cuda_graph: Flag = False


class Compile(Section):
    """Passes of the graph compiler; `free_activation_threshold` in bytes."""

    deepcompile: Flag = False
    free_activation: Flag = False
    free_activation_threshold: Count = 10 * 1024 * 1024
    offload_activation: Flag = False
    offload_activation_pin_memory: Flag = True
    offload_opt_states: Flag = False
    double_buffer: Flag = True
    symmetric_memory: Flag = False
    debug_log: Flag = False
    offload_parameters: Flag = False
    sync_before_reduce: Flag = False
    sync_after_reduce: Flag = False
    sync_before_allgather: Flag = False
    sync_after_allgather: Flag = False
    keep_int_input_tensors: Flag = True
    keep_all_input_tensors: Flag = False
    passes: Texts | None = None


class SparseAttention(Section):
    """Block-sparse attention layouts; sizes in blocks."""

    mode: Annotated[str, choice("dense", "fixed", "variable", "bigbird", "bslongformer")] = "fixed"
    block: PositiveCount = 16
    different_layout_per_head: Flag = False
    num_local_blocks: Count = 4
    num_global_blocks: Count = 1
    attention: Annotated[str, choice("bidirectional", "unidirectional")] = "bidirectional"
    horizontal_global_attention: Flag = False
    num_different_global_patterns: Count = 1
    num_random_blocks: Count = 0
    local_window_blocks: Counts = Field(default_factory=lambda: [4])
    global_block_indices: Counts = Field(default_factory=lambda: [0])
    global_block_end_indices: Counts | None = None
    num_sliding_window_blocks: Count = 3
