"""What building a model shard by shard needs to know of a config, which may be unfinished at that time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from craken.disk import IoSettings
from craken.log import warn_once
from craken.zero.memory.placement import Place
from craken.zero.memory.shelf import DiskSettings, Kind
from craken.zero.plans.policy import Policy, policy_for_stage

_SHARDED = 3  # without a config


@dataclass(frozen=True)
class BuildSettings:
    """The policy row, the dtype to cast parameters to (None: as they are), where shards wait, the folder for files.

    pins: host memory that shards wait in, or pass through, is page-locked.
    """

    policy: Policy
    dtype: torch.dtype | None
    place: Place
    folder: Path | None
    pins: bool

    @property
    def disks(self) -> dict[Kind, DiskSettings]:
        """What a shelf needs to make files; nothing unless shards wait in files."""
        if self.place is not Place.DISK:
            return {}
        if self.folder is None:
            raise ValueError(
                "zero.Init: expected a folder for parameters on 'nvme', got none: write "
                "zero_optimization.offload_param.nvme_path, or set ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH for "
                "accelerate launch, which drops the path of its own file"
            )
        return {"weights": DiskSettings(self.folder, IoSettings(), num_buffers=2, pins=self.pins)}


def settings_from(
    config: Any, *, dtype: torch.dtype | None, remote_device: str | None, pin_memory: bool
) -> BuildSettings:
    """Read a dict, a JSON file or a parsed config; the arguments win over it where set. "auto" counts as unset."""
    if config is None:
        return BuildSettings(policy_for_stage(_SHARDED), dtype, _place(remote_device), None, pin_memory)
    keys = _mapping_of(config)
    zero = _section(keys, "zero_optimization")
    stage, offload = zero.get("stage", 0), _section(zero, "offload_param")
    folder = offload.get("nvme_path")
    return BuildSettings(
        policy_for_stage(0 if stage == "auto" else int(stage)),
        dtype or _compute_dtype(keys),
        _place(remote_device or offload.get("device")),
        None if folder in (None, "none", "auto") else Path(str(folder)).expanduser(),
        pin_memory or offload.get("pin_memory") is not False,  # as `initialize` has it
    )


def say_what_has_no_effect(policy: Policy, **arguments: Any) -> None:
    """Warn once of each argument of `Init` that is set, though nothing here follows it."""
    for name, given in arguments.items():
        if given and policy.frees_params:
            warn_once(f"zero.Init({name}=...) has no effect here: {_NO_EFFECT[name]}")


_IN_CONFIG = "`initialize` decides how weights travel; write zero_optimization.{} into its config"
_NO_EFFECT = {
    "mem_efficient_linear": "no layer keeps whole weights for backward, though torch's linear function stays",
    "zero_quantized_weights": _IN_CONFIG.format("zero_quantized_weights"),
    "zero_quantized_nontrainable_weights": _IN_CONFIG.format("zero_quantized_nontrainable_weights"),
    "zero_param_parallel_group": _IN_CONFIG.format("zero_hpz_partition_size"),
    "param_swapper": "shards that wait in files have a swapper of their own; offload_param.nvme_path names the folder",
    "pin_memory": "nothing waits in the host's memory; it belongs to remote_device='cpu' or 'nvme'",
    "tensor_overrides": "parameters compute on the device, and buffers are moved there when their module is built",
}


def _mapping_of(config: Any) -> Mapping[str, Any]:
    raw = getattr(config, "raw", config)
    if isinstance(raw, Mapping):
        return raw
    if isinstance(raw, (str, os.PathLike)) and Path(raw).is_file():
        read = json.loads(Path(raw).read_text(encoding="utf-8-sig"))
        if isinstance(read, dict):
            return read
    raise ValueError(f"zero.Init: expected config_dict_or_path to be a dict or the path of a JSON file, got {config!r}")


def _section(keys: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = keys.get(name)
    return section if isinstance(section, Mapping) else {}


def _compute_dtype(keys: Mapping[str, Any]) -> torch.dtype:
    named = (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16))
    return next((dtype for name, dtype in named if _section(keys, name).get("enabled") is True), torch.float32)


def _place(device: Any) -> Place:
    if device in (None, "none", "auto"):
        return Place.DEVICE
    places = {"cpu": Place.HOST, "nvme": Place.DISK}
    if device not in places:
        raise ValueError(f"zero.Init: expected parameters on 'none', 'cpu' or 'nvme', got {device!r}")
    return places[device]
