"""Sections about checkpoints and the services that keep them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from craken.config.section import Section
from craken.config.values import Flag, PositiveCount, Rate, Text, choice


class ParallelWrite(Section):
    """Whether pipeline stages write their layers at the same time."""

    pipeline_stage: Flag = False


class CheckpointWriter(Section):
    """How checkpoint files reach the disk; sizes in bytes."""

    type: Annotated[str, choice("mock", "python", "fast")] = "fast"
    decoupled: Flag = False
    io_buffer_size: PositiveCount = 64 * 1024**2
    io_buffer_double: Flag = True
    io_multiplier: PositiveCount = 1
    show_statistics: Flag = False
    data_parallel: Annotated[str, choice("replica", "socket", "machine")] | None = None


class Checkpoint(Section):
    """What is checked and where files go when a checkpoint is saved."""

    tag_validation: Annotated[str, choice("warn", "ignore", "fail")] = "warn"
    load_universal: Flag = False
    use_node_local_storage: Flag = False
    checkpoint_serialization: Flag = True
    async_save: Flag = False
    keep_last: PositiveCount | None = None
    save_gradients: Flag = False
    parallel_write: ParallelWrite = Field(default_factory=ParallelWrite)
    writer: CheckpointWriter | None = None


class Nebula(Section):
    """An asynchronous checkpoint service; `persistent_time_interval` in seconds."""

    enabled: Flag = False
    enable_nebula_load: Flag = True
    nebula_load_path: Text | None = None
    persistent_storage_path: Text | None = None
    persistent_time_interval: Rate = 100.0
    num_of_version_in_retention: PositiveCount = 2
