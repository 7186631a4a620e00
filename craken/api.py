"""The way in: `initialize` turns a model and a config into an engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from craken.comm import expected_world_size, get_accelerator, init_distributed, world_axis
from craken.config import BatchSizes, check_mesh, load_config, resolve_batch
from craken.engine import (
    DeepSpeedEngine,
    Request,
    ResumableLoader,
    build_parts,
    check_buildable,
    check_monitors,
    check_ranks_agree,
    check_supported,
    find_config,
)
from craken.engine.request import OptimizerOrFactory
from craken.zero import ParameterOffload, ShardedOptimizer, paused

Initialized = tuple[DeepSpeedEngine, ShardedOptimizer | ParameterOffload | None, ResumableLoader[Any] | None, Any]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: OptimizerOrFactory | None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> Initialized:
    """Build an engine around `model`; collective over all ranks of the job.

    config: a dict, a path to JSON, or base64-encoded JSON; also found as `args.deepspeed_config`. optimizer: a torch
    optimizer or a function of the parameters; default the config's. model_parameters: parameters or groups of them for
    the config's optimizer; default all that require grad. lr_scheduler: an instance or a function of the optimizer.
    training_data: a data set; a sharded, resumable dataloader over it is returned.

    Returns (engine, optimizer, dataloader, lr_scheduler); the last three may be None. At stage 3 without an optimizer,
    the second is what takes the model's hooks off. Parameters keep their identity: only their data move into flat
    buffers. Raises ValueError for wrong input, NotImplementedError for documented gaps.
    """
    parsed = load_config(find_config(config, config_params, args))
    if model is None:
        raise ValueError("initialize() needs model=: expected a torch.nn.Module, got None")
    request = Request(model, optimizer, model_parameters, training_data, lr_scheduler, collate_fn)
    accelerator = get_accelerator()
    check_supported(parsed, accelerator, mpu=mpu, mesh_param=mesh_param)
    check_config(
        parsed, expected_world_size(), has_optimizer=optimizer is not None, has_scheduler=lr_scheduler is not None
    )
    # here ranks meet for the first time: what is wrong on all of them has been said
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    axis = world_axis("dp")
    check_ranks_agree(parsed.raw, model, axis)  # before any check that could fail on some ranks only
    with paused():  # a zero.Init that is open is about the user's modules
        engine = DeepSpeedEngine(build_parts(request, parsed, axis, accelerator))
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def check_config(
    config: Any, num_ranks: int, *, has_optimizer: bool = False, has_scheduler: bool = False
) -> BatchSizes:
    """Raise what `initialize` would raise for a config on each of `num_ranks` ranks, without ranks or a model.

    Returns the batch sizes that it means. has_optimizer, has_scheduler: whether one is handed to `initialize` in
    place of the config's. ValueError or NotImplementedError naming the key.
    """
    parsed = load_config(config)
    batch = resolve_batch(parsed, num_ranks)
    check_mesh(parsed.zero_optimization, num_ranks)
    check_monitors(parsed)
    check_buildable(parsed, has_optimizer=has_optimizer, has_scheduler=has_scheduler)
    return batch


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config FILE` to a script's parser, and return it."""
    group = parser.add_argument_group("DeepSpeed", "configuration")
    group.add_argument("--deepspeed", action="store_true", help="train with DeepSpeed (a flag for your script to read)")
    group.add_argument("--deepspeed_config", type=str, default=None, metavar="FILE", help="the JSON config")
    group.add_argument("--deepscale", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", type=str, default=None, help=argparse.SUPPRESS)
    return parser
