"""Sections that say where progress is logged and what is measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from craken.config.section import Section
from craken.config.values import Flag, PositiveCount, Rate, Text, Texts, choice, whole


class TensorBoard(Section):
    """Event files for TensorBoard."""

    enabled: Flag = False
    output_path: Text = ""
    job_name: Text = "DeepSpeedJobName"


class Wandb(Section):
    """Weights & Biases."""

    enabled: Flag = False
    group: Text | None = None
    team: Text | None = None
    project: Text = "deepspeed"


class CsvMonitor(Section):
    """One CSV file a metric."""

    enabled: Flag = False
    output_path: Text = ""
    job_name: Text = "DeepSpeedJobName"


class Comet(Section):
    """Comet experiments; `samples_log_interval` in samples."""

    enabled: Flag = False
    samples_log_interval: PositiveCount = 100
    project: Text | None = None
    workspace: Text | None = None
    api_key: Text | None = None
    experiment_name: Text | None = None
    experiment_key: Text | None = None
    online: Flag | None = None
    mode: Annotated[str, choice("get", "create", "get_or_create")] | None = None


class FlopsProfiler(Section):
    """Operations a module executes in one step."""

    enabled: Flag = False
    recompute_fwd_factor: Rate = 0.0
    profile_step: PositiveCount = 1
    module_depth: Annotated[int, whole(-1)] = -1
    top_modules: PositiveCount = 1
    detailed: Flag = True
    output_file: Text | None = None


class CommsLogger(Section):
    """A log of collectives."""

    enabled: Flag = False
    prof_all: Flag = True
    prof_ops: Texts = Field(default_factory=list)
    verbose: Flag = False
    debug: Flag = False


class ThroughputTimer(Section):
    """Samples a second, measured every step."""

    enabled: Flag = True
    synchronized: Flag = True


class Timers(Section):
    """The timers that run during training."""

    throughput: ThroughputTimer = Field(default_factory=ThroughputTimer)
