"""Activation checkpointing by call: a stretch of a model keeps its inputs alone, and runs again in backward.

configure(None, checkpoint_in_cpu=True)        optional, once
x = checkpoint(block, x, mask)                 in the model's forward
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint

from craken.config import read_config
from craken.log import warn_once

_NO_EFFECT = {
    "partition_activations": "inputs are sharded over tensor-parallel ranks, of which there are none",
    "contiguous_checkpointing": "the allocators keep memory in pieces that fit again",
    "num_checkpoints": "nothing is set aside beforehand",
    "synchronize": "streams wait for each other where they must",
    "profile": "use torch.profiler; recomputation shows there",
}


@dataclass
class _Settings:
    is_configured: bool = False
    waits_on_host: bool = False


_settings = _Settings()


def configure(
    mpu_: Any,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Choose how `checkpoint` keeps inputs, for this process: by arguments, else by `activation_checkpointing`.

    checkpoint_in_cpu: they wait in the host's memory. `deepspeed_config` is a dict or a file; the other arguments have
    no effect here, which is said once.
    """
    section = {} if deepspeed_config is None else _section(deepspeed_config)
    asked = {
        "partition_activations": _first(partition_activations, section.get("partition_activations")),
        "contiguous_checkpointing": _first(contiguous_checkpointing, section.get("contiguous_memory_optimization")),
        "num_checkpoints": _first(num_checkpoints, section.get("number_checkpoints")),
        "synchronize": _first(synchronize, section.get("synchronize_checkpoint_boundary")),
        "profile": _first(profile, section.get("profile")),
    }
    for name, value in asked.items():
        if value:
            warn_once(f"checkpointing.configure({name}=...) has no effect here: {_NO_EFFECT[name]}")
    _settings.waits_on_host = bool(_first(checkpoint_in_cpu, section.get("cpu_checkpointing")))
    _settings.is_configured = True


def is_configured() -> bool:
    """Say whether `configure` was called."""
    return _settings.is_configured


def reset() -> None:
    """Do nothing: no buffers are kept from one step to the next."""


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`, which runs again in backward in place of keeping what it computed.

    The state of the random generators is the same both times.
    """
    if not _settings.waits_on_host:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)
    with _on_host(args):
        # the reentrant kind saves its inputs as any operator does, so that they can be kept elsewhere
        run = partial(_call, function, tuple(kwargs), len(args))
        return torch.utils.checkpoint.checkpoint(run, *args, *kwargs.values(), use_reentrant=True)


def _call(function: Callable[..., Any], names: tuple[str, ...], num_args: int, *inputs: Any) -> Any:
    return function(*inputs[:num_args], **dict(zip(names, inputs[num_args:], strict=True)))


def _on_host(args: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    pins = any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)
    return torch.autograd.graph.save_on_cpu(pin_memory=pins)


def _section(config: Any) -> Mapping[str, Any]:
    keys = read_config(config)
    section = keys.get("activation_checkpointing")
    return section if isinstance(section, Mapping) else {}


def _first(argument: Any, from_config: Any) -> Any:
    return from_config if argument is None else argument
