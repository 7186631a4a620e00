"""The whole configuration: top-level keys and one attribute a section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, PrivateAttr

from craken.config.section import Section
from craken.config.sections.compression import CompressionTraining
from craken.config.sections.data import (
    Autotuning,
    CurriculumLearning,
    DataEfficiency,
    Elasticity,
    ProgressiveLayerDrop,
)
from craken.config.sections.memory import ActivationCheckpointing, Aio, CudaGraph
from craken.config.sections.monitors import (
    Comet,
    CommsLogger,
    CsvMonitor,
    FlopsProfiler,
    TensorBoard,
    Timers,
    Wandb,
)
from craken.config.sections.parallel import (
    Compile,
    ExpertParallel,
    HybridEngine,
    Pipeline,
    SparseAttention,
    TensorParallel,
)
from craken.config.sections.precision import Bf16, DataTypes, Fp16, TorchAutocast, WeightQuantization
from craken.config.sections.storage import Checkpoint, Nebula
from craken.config.sections.training import Optimizer, Scheduler
from craken.config.sections.zero import ZeroOptimization
from craken.config.values import (
    Count,
    Dtype,
    Flag,
    Object,
    PositiveCount,
    PositiveRate,
    Rate,
    StepsOrNever,
    Text,
    choice,
)


class Config(Section):
    """A checked configuration. Made by `load_config`; `raw` is what the user gave.

    A key that is absent, null or "auto" has its default. Sections always exist, except those that are None by
    default. Sizes are in elements, batch sizes in samples.
    """

    aliases: ClassVar[Mapping[str, str]] = {"bfloat16": "bf16"}

    train_batch_size: PositiveCount | None = None
    train_micro_batch_size_per_gpu: PositiveCount | None = None
    gradient_accumulation_steps: PositiveCount | None = None
    managed_gradient_accumulation: Flag = True
    steps_per_print: StepsOrNever | None = None
    gradient_clipping: Rate = 1.0
    prescale_gradients: Flag = False
    gradient_predivide_factor: PositiveRate = 1.0
    gradient_allreduce_op: Annotated[str, choice("mean", "sum")] = "mean"
    sparse_gradients: Flag = False
    communication_data_type: Dtype | None = None
    seq_parallel_communication_data_type: Dtype = "fp32"
    communication_data_size: Any = None
    disable_allgather: Flag = False
    allgather_size: Count = 500_000_000
    sequence_parallel_size: PositiveCount = 1
    data_parallel_size: PositiveCount | None = None
    use_data_before_expert_parallelism: Flag = False
    dataloader_drop_last: Flag = False
    zero_allow_untested_optimizer: Flag = False
    zero_force_ds_cpu_optimizer: Flag = True
    wall_clock_breakdown: Flag = False
    memory_breakdown: Flag = False
    dump_state: Flag = False
    log_level: Text | None = None
    graph_harvesting: Flag = False
    vocabulary_size: PositiveCount | None = None

    optimizer: Optimizer | None = None
    scheduler: Scheduler | None = None
    fp16: Fp16 = Field(default_factory=Fp16)
    bf16: Bf16 = Field(default_factory=Bf16)
    amp: Object = Field(default_factory=dict)
    torch_autocast: TorchAutocast = Field(default_factory=TorchAutocast)
    data_types: DataTypes = Field(default_factory=DataTypes)
    zero_optimization: ZeroOptimization = Field(default_factory=ZeroOptimization)
    activation_checkpointing: ActivationCheckpointing = Field(default_factory=ActivationCheckpointing)
    aio: Aio = Field(default_factory=Aio)
    cuda_graph: CudaGraph = Field(default_factory=CudaGraph)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tensorboard: TensorBoard = Field(default_factory=TensorBoard)
    wandb: Wandb = Field(default_factory=Wandb)
    csv_monitor: CsvMonitor = Field(default_factory=CsvMonitor)
    comet: Comet = Field(default_factory=Comet)
    flops_profiler: FlopsProfiler = Field(default_factory=FlopsProfiler)
    comms_logger: CommsLogger = Field(default_factory=CommsLogger)
    timers: Timers = Field(default_factory=Timers)
    pipeline: Pipeline = Field(default_factory=Pipeline)
    tensor_parallel: TensorParallel = Field(default_factory=TensorParallel)
    expert_parallel: ExpertParallel = Field(default_factory=ExpertParallel)
    hybrid_engine: HybridEngine = Field(default_factory=HybridEngine)
    inference: Object = Field(default_factory=dict)
    compile: Compile = Field(default_factory=Compile)
    sparse_attention: SparseAttention | None = None
    weight_quantization: WeightQuantization | None = None
    quantize_training: Object = Field(default_factory=dict)
    compression_training: CompressionTraining = Field(default_factory=CompressionTraining)
    data_efficiency: DataEfficiency = Field(default_factory=DataEfficiency)
    curriculum_learning: CurriculumLearning = Field(default_factory=CurriculumLearning)
    progressive_layer_drop: ProgressiveLayerDrop = Field(default_factory=ProgressiveLayerDrop)
    elasticity: Elasticity = Field(default_factory=Elasticity)
    autotuning: Autotuning = Field(default_factory=Autotuning)
    nebula: Nebula = Field(default_factory=Nebula)
    datastates_ckpt: Any = None

    _raw: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def raw(self) -> Mapping[str, Any]:
        """What the user gave: the very object when it was a dict, else the parsed JSON."""
        return self._raw
