"""Sections that trade memory for time: activation checkpointing, asynchronous I/O, CUDA graphs."""

from __future__ import annotations

from craken.config.section import Section
from craken.config.values import Flag, PositiveCount


class ActivationCheckpointing(Section):
    """Which activations are kept, recomputed, sharded or moved to the host."""

    partition_activations: Flag = False
    contiguous_memory_optimization: Flag = False
    cpu_checkpointing: Flag = False
    number_checkpoints: PositiveCount | None = None
    synchronize_checkpoint_boundary: Flag = False
    profile: Flag = False


class Aio(Section):
    """Asynchronous reads and writes for offload to a disk; `block_size` in bytes."""

    block_size: PositiveCount = 1_048_576
    queue_depth: PositiveCount = 8
    intra_op_parallelism: PositiveCount = 4
    single_submit: Flag = False
    overlap_events: Flag = True
    use_gds: Flag = False


class CudaGraph(Section):
    """Whether a step is captured into a CUDA graph."""

    enabled: Flag = False
