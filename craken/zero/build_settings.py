"""What building a model shard by shard needs to know of a config, which may be unfinished at that time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from craken.zero.policy import Policy, policy_for_stage

_SHARDED = 3  # without a config


@dataclass(frozen=True)
class BuildSettings:
    """The policy row, the dtype to cast parameters to (None: as they are), where shards wait ("": the device)."""

    policy: Policy
    dtype: torch.dtype | None
    offload: str


def settings_from(config: Any, *, dtype: torch.dtype | None, remote_device: str | None) -> BuildSettings:
    """Read a dict, a JSON file or a parsed config; `dtype` and `remote_device` win over it. "auto" counts as unset."""
    if config is None:
        return BuildSettings(policy_for_stage(_SHARDED), dtype, _unless_none(remote_device))
    keys = _mapping_of(config)
    zero = _section(keys, "zero_optimization")
    stage = zero.get("stage", 0)
    return BuildSettings(
        policy_for_stage(0 if stage == "auto" else int(stage)),
        dtype or _compute_dtype(keys),
        _unless_none(remote_device or _section(zero, "offload_param").get("device")),
    )


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


def _unless_none(device: Any) -> str:
    return "" if device in (None, "none", "auto") else str(device)
