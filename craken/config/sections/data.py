"""Sections that change the data, the job's size or the search for settings while training runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from craken.config.section import Section
from craken.config.values import Count, Counts, FilePath, Flag, Object, PositiveCount, Rate, Text, choice


class DynamicBatching(Section):
    """Batches by number of tokens instead of samples."""

    enabled: Flag = False
    metrics_path: FilePath | None = None
    lr_scaling_method: Annotated[str, choice("linear", "sqrt", "none")] = "linear"
    min_batch_size: PositiveCount = 1
    max_batch_size: PositiveCount | None = None
    sequence_picking_order: Annotated[str, choice("random", "seqlen", "dataloader")] = "dataloader"
    max_tokens: PositiveCount | None = None
    verbose: Flag = False


class CurriculumSampling(Section):
    """Samples ordered by difficulty metrics."""

    enabled: Flag = False
    data_cluster_path: FilePath | None = None
    curriculum_metrics: Object = Field(default_factory=dict)


class DataSampling(Section):
    """How the data loader picks samples."""

    enabled: Flag = False
    num_epochs: PositiveCount = 1000
    num_workers: Count = 0
    pin_memory: Flag = False
    curriculum_learning: CurriculumSampling = Field(default_factory=CurriculumSampling)
    dynamic_batching: DynamicBatching = Field(default_factory=DynamicBatching)


class RandomLtd(Section):
    """Layers that drop random tokens."""

    enabled: Flag = False
    total_layer_num: PositiveCount | None = None
    random_ltd_layer_num: Count | None = None
    random_ltd_layer_id: Counts | None = None
    model_mask_name: Text | None = None
    model_type: Text | None = None
    micro_batch_size: PositiveCount | None = None
    global_batch_size: PositiveCount | None = None
    hidden_state_order: Text | None = None
    layer_token_lr_schedule: Object = Field(default_factory=dict)
    random_ltd_schedule: Object = Field(default_factory=dict)


class DataRouting(Section):
    """Which tokens pass through which layers."""

    enabled: Flag = False
    random_ltd: RandomLtd = Field(default_factory=RandomLtd)


class DataEfficiency(Section):
    """Sampling and routing of training data."""

    enabled: Flag = False
    seed: Count = 1234
    data_sampling: DataSampling = Field(default_factory=DataSampling)
    data_routing: DataRouting = Field(default_factory=DataRouting)


class CurriculumLearning(Section):
    """The older curriculum: sequence length that grows with steps."""

    enabled: Flag = False
    curriculum_type: Text | None = None
    min_difficulty: Count | None = None
    max_difficulty: Count | None = None
    schedule_type: Text | None = None
    schedule_config: Object = Field(default_factory=dict)


class ProgressiveLayerDrop(Section):
    """Layers skipped at random, more of them as training goes on."""

    enabled: Flag = False
    theta: Rate = 1.0
    gamma: Rate = 0.001


class Elasticity(Section):
    """Batch sizes that fit many world sizes; `min_time` in minutes."""

    enabled: Flag = False
    max_train_batch_size: PositiveCount = 2000
    micro_batch_sizes: Counts = Field(default_factory=lambda: [2, 4, 6])
    min_gpus: PositiveCount = 1
    max_gpus: PositiveCount = 10000
    min_time: Count = 0
    version: Rate = 0.2
    prefer_larger_batch: Flag = True
    ignore_non_elastic_batch_info: Flag = False
    model_parallel_size: PositiveCount = 1
    num_gpus_per_node: PositiveCount = 1


class ModelInfo(Section):
    """Sizes of the model that the tuner would otherwise measure."""

    profile: Flag = False
    num_params: PositiveCount | None = None
    hidden_size: PositiveCount | None = None
    num_layers: PositiveCount | None = None


class Autotuning(Section):
    """The search for fast settings by trial runs."""

    enabled: Flag = False
    fast: Flag = True
    results_dir: FilePath = "autotuning_results"
    exps_dir: FilePath = "autotuning_exps"
    overwrite: Flag = True
    start_profile_step: Count = 3
    end_profile_step: Count = 5
    metric: Text = "throughput"
    metric_path: FilePath | None = None
    tuner_type: Annotated[str, choice("gridsearch", "random", "model_based")] = "gridsearch"
    tuner_early_stopping: Count = 5
    tuner_num_trials: PositiveCount = 50
    arg_mappings: Object | None = None
    model_info: ModelInfo | None = None
    model_info_path: FilePath | None = None
    mp_size: PositiveCount = 1
    max_train_batch_size: PositiveCount | None = None
    min_train_batch_size: PositiveCount = 1
    max_train_micro_batch_size_per_gpu: PositiveCount = 1024
    min_train_micro_batch_size_per_gpu: PositiveCount = 1
    num_tuning_micro_batch_sizes: PositiveCount = 3
