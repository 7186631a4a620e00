"""Known keys of data sampling, compression, elasticity and tuning."""

from __future__ import annotations

from typing import Any

from craken.config.keys.row import KnownKey, Status, rows, section

LATER, NO_EFFECT = Status.LATER, Status.NO_EFFECT
COMPRESSION = "weights and activations are not compressed while training"
SAMPLING = "samples come in the data loader's order"
ROUTING = "every layer sees every token"

DATA = [
    *section(
        "data_efficiency",
        NO_EFFECT,
        SAMPLING,
        enabled=True,
        seed=1,
        data_sampling={"enabled": True},
        data_routing={"enabled": True},
    ),
    *rows(
        "data_efficiency.data_sampling",
        ("enabled", NO_EFFECT, True, SAMPLING),
        ("num_epochs", NO_EFFECT, 2, SAMPLING),
        ("num_workers", NO_EFFECT, 1, SAMPLING),
        ("pin_memory", NO_EFFECT, True, SAMPLING),
        ("curriculum_learning", NO_EFFECT, {"enabled": True}, SAMPLING),
        ("curriculum_learning.enabled", NO_EFFECT, True, SAMPLING),
        ("curriculum_learning.data_cluster_path", NO_EFFECT, "path", SAMPLING),
        ("curriculum_learning.curriculum_metrics", NO_EFFECT, {"seqlen": {}}, SAMPLING),
        *(
            (f"curriculum_learning.curriculum_metrics.*.{name}", NO_EFFECT, sample, SAMPLING)
            for name, sample in {
                "index_to_sample_path": "path",
                "index_to_metric_path": "path",
                "difficulty_type": "value",
                "clustering_type": "single_cluster",
                "min_difficulty": 8,
                "max_difficulty": 64,
                "schedule_type": "fixed_root",
                "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 8, "root_degree": 2},
            }.items()
        ),
        ("dynamic_batching", NO_EFFECT, {"enabled": True}, SAMPLING),
        ("dynamic_batching.enabled", NO_EFFECT, True, SAMPLING),
        ("dynamic_batching.metrics_path", NO_EFFECT, "path", SAMPLING),
        ("dynamic_batching.lr_scaling_method", NO_EFFECT, "sqrt", SAMPLING),
        ("dynamic_batching.min_batch_size", NO_EFFECT, 2, SAMPLING),
        ("dynamic_batching.max_batch_size", NO_EFFECT, 8, SAMPLING),
        ("dynamic_batching.sequence_picking_order", NO_EFFECT, "seqlen", SAMPLING),
        ("dynamic_batching.max_tokens", NO_EFFECT, 4096, SAMPLING),
        ("dynamic_batching.verbose", NO_EFFECT, True, SAMPLING),
    ),
    *rows(
        "data_efficiency.data_routing",
        ("enabled", NO_EFFECT, True, ROUTING),
        ("random_ltd", NO_EFFECT, {"enabled": True}, ROUTING),
        *(
            (f"random_ltd.{name}", NO_EFFECT, sample, ROUTING)
            for name, sample in {
                "enabled": True,
                "total_layer_num": 24,
                "random_ltd_layer_num": 22,
                "random_ltd_layer_id": [1, 2],
                "model_mask_name": "attention_mask",
                "model_type": "decoder",
                "micro_batch_size": 1,
                "global_batch_size": 8,
                "hidden_state_order": "batch_seq_dim",
                "layer_token_lr_schedule": {"enabled": True},
                "layer_token_lr_schedule.enabled": True,
                "layer_token_lr_schedule.total_layer_tokens": 100,
                "layer_token_lr_schedule.warmup_type": "linear",
                "layer_token_lr_schedule.warmup_layer_tokens": 10,
                "random_ltd_schedule": {"min_value": 128},
                "random_ltd_schedule.min_value": 128,
                "random_ltd_schedule.max_value": 1024,
                "random_ltd_schedule.schedule_type": "fixed_linear",
                "random_ltd_schedule.schedule_config": {"require_steps": 10, "seq_per_step": 16},
            }.items()
        ),
    ),
    *section(
        "curriculum_learning",
        NO_EFFECT,
        SAMPLING,
        enabled=True,
        curriculum_type="seqlen",
        min_difficulty=8,
        max_difficulty=64,
        schedule_type="fixed_linear",
        schedule_config={"total_curriculum_step": 10, "difficulty_step": 8},
    ),
    *rows(
        "curriculum_learning.schedule_config",
        ("total_curriculum_step", NO_EFFECT, 10, SAMPLING),
        ("difficulty_step", NO_EFFECT, 8, SAMPLING),
        ("root_degree", NO_EFFECT, 2, SAMPLING),
        ("difficulty", NO_EFFECT, [1, 2], SAMPLING),
        ("max_step", NO_EFFECT, [5, 10], SAMPLING),
    ),
    *section("progressive_layer_drop", LATER, "every layer runs", enabled=True, theta=0.5, gamma=0.01),
]

GROUPS: dict[str, dict[str, Any]] = {
    "weight_quantization": {
        "start_bits": 8,
        "target_bits": 4,
        "quantization_period": 50,
        "quantize_groups": 1,
    },
    "activation_quantization": {"bits": 8},
    "sparse_pruning": {"dense_ratio": 0.5},
    "row_pruning": {"dense_ratio": 0.5},
    "head_pruning": {"dense_ratio": 0.5},
    "channel_pruning": {"dense_ratio": 0.5},
}

PRUNING: dict[str, Any] = {"enabled": True, "method": "topk", "schedule_offset": 10}

SHARED: dict[str, dict[str, Any]] = {
    "weight_quantization": {
        "enabled": True,
        "quantizer_kernel": True,
        "schedule_offset": 10,
        "quantize_groups": 2,
        "quantize_verbose": True,
        "quantization_type": "asymmetric",
        "quantize_weight_in_forward": True,
        "rounding": "stochastic",
        "fp16_mixed_quantize": {"enabled": True, "quantize_change_ratio": 0.01},
        "fp16_mixed_quantize.enabled": True,
        "fp16_mixed_quantize.quantize_change_ratio": 0.01,
    },
    "activation_quantization": {
        "enabled": True,
        "quantization_type": "asymmetric",
        "range_calibration": "static",
        "schedule_offset": 10,
    },
    "sparse_pruning": {
        **PRUNING,
        "schedule_offset_end": 20,
        "schedule_offset_stride": 2,
        "block_pattern": "4x1",
        "dense_ratio": 0.2,
        "excluded_modules": ["lm_head"],
    },
    "row_pruning": PRUNING,
    "head_pruning": {**PRUNING, "num_heads": 12},
    "channel_pruning": PRUNING,
}


def _technique(name: str) -> list[KnownKey]:
    path = f"compression_training.{name}"
    group = {"modules": ["layer"], "related_modules": [["norm"]], "params": GROUPS[name]}
    inner = {**group, **{f"params.{key}": sample for key, sample in GROUPS[name].items()}}
    return [
        KnownKey(path, LATER, {"shared_parameters": {"enabled": True}}, COMPRESSION),
        KnownKey(f"{path}.shared_parameters", LATER, {"enabled": True}, COMPRESSION),
        *(
            KnownKey(f"{path}.shared_parameters.{key}", LATER, sample, COMPRESSION)
            for key, sample in SHARED[name].items()
        ),
        KnownKey(f"{path}.different_groups", LATER, {"group1": group}, COMPRESSION),
        *(KnownKey(f"{path}.different_groups.*.{key}", LATER, sample, COMPRESSION) for key, sample in inner.items()),
    ]


COMPRESSIONS = [
    KnownKey("compression_training", LATER, {"layer_reduction": {"enabled": True}}, COMPRESSION),
    KnownKey("compression_training.shared_parameters", LATER, {"enabled": False}, COMPRESSION),
    *(row for name in SHARED for row in _technique(name)),
    *section(
        "compression_training.layer_reduction",
        LATER,
        COMPRESSION,
        enabled=True,
        keep_number_layer=6,
        module_name_prefix="layers",
        teacher_layer=[0, 2],
        other_module_name=["embed"],
    ),
    *section(
        "weight_quantization",
        LATER,
        "weights are not quantised",
        enabled=True,
        num_bits=4,
        q_type="asymmetric",
        q_groups=2,
        quantized_initialization={"num_bits": 4},
        post_init_quant={"layer": {"num_bits": 4}},
    ),
    KnownKey("quantize_training", NO_EFFECT, {"eigenvalue": {"enabled": False}}, COMPRESSION),
    *section(
        "quantize_training.eigenvalue",
        NO_EFFECT,
        COMPRESSION,
        enabled=False,
        verbose=True,
        max_iter=10,
        tol=0.1,
        stability=1e-6,
        gas_boundary_resolution=1,
        layer_name="layers",
        layer_num=2,
    ),
]

SEARCHES = [
    *section(
        "elasticity",
        LATER,
        "the batch sizes of the configuration hold",
        enabled=True,
        max_train_batch_size=2000,
        micro_batch_sizes=[2, 4],
        min_gpus=2,
        max_gpus=64,
        min_time=20,
        version=0.1,
        prefer_larger_batch=False,
        ignore_non_elastic_batch_info=True,
        model_parallel_size=1,
        num_gpus_per_node=8,
    ),
    *section(
        "autotuning",
        LATER,
        "no trial runs are made",
        enabled=True,
        fast=False,
        results_dir="results",
        exps_dir="experiments",
        overwrite=False,
        start_profile_step=2,
        end_profile_step=4,
        metric="latency",
        metric_path="path",
        tuner_type="random",
        tuner_early_stopping=3,
        tuner_num_trials=10,
        arg_mappings={"train_micro_batch_size_per_gpu": "--batch"},
        model_info={"num_params": 1e9},
        model_info_path="path",
        mp_size=1,
        max_train_batch_size=512,
        min_train_batch_size=8,
        max_train_micro_batch_size_per_gpu=64,
        min_train_micro_batch_size_per_gpu=2,
        num_tuning_micro_batch_sizes=2,
    ),
    *rows(
        "autotuning.model_info",
        ("profile", LATER, True, "no trial runs are made"),
        ("num_params", LATER, 1e9, "no trial runs are made"),
        ("hidden_size", LATER, 1024, "no trial runs are made"),
        ("num_layers", LATER, 24, "no trial runs are made"),
    ),
]

DATA_KEYS = [*DATA, *COMPRESSIONS, *SEARCHES]
