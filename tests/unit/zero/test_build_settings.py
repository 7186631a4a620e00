"""What is read of a config before it is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from craken.zero import Keep, Place
from craken.zero.building import settings as build_settings
from craken.zero.building.settings import BuildSettings, say_what_has_no_effect
from craken.zero.plans.policy import policy_for_stage


def settings_from(config: Any, pin_memory: bool = False, **arguments: Any) -> BuildSettings:
    return build_settings.settings_from(config, pin_memory=pin_memory, **arguments)


def test_an_unfinished_config_is_enough() -> None:
    config = {
        "train_batch_size": "auto",
        "steps_per_print": float("inf"),
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": "auto",
            "offload_param": {"device": "cpu", "nvme_path": None},
        },
    }
    settings = settings_from(config, dtype=None, remote_device=None)
    assert settings.policy.params is Keep.SHARD
    assert settings.dtype is torch.bfloat16
    assert settings.place is Place.HOST


@pytest.mark.parametrize(
    ("config", "shards", "dtype"),
    [
        (None, True, None),
        ({}, False, torch.float32),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, False, torch.float16),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}, True, torch.float32),
    ],
)
def test_stage_and_dtype_follow_the_config(config, shards, dtype) -> None:
    settings = settings_from(config, dtype=None, remote_device=None)
    assert (settings.policy.params is Keep.SHARD, settings.dtype, settings.place) == (shards, dtype, Place.DEVICE)


def test_arguments_win_over_the_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}))
    settings = settings_from(str(path), dtype=torch.float16, remote_device="nvme")
    assert (settings.dtype, settings.place) == (torch.float16, Place.DISK)
    with pytest.raises(ValueError, match=r"nvme_path, or set ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH"):
        _ = settings.disks
    assert settings_from(path, dtype=None, remote_device="none").place is Place.DEVICE


def test_anything_else_is_refused(tmp_path: Path) -> None:
    for config in (str(tmp_path / "absent.json"), 3, ["stage"]):
        with pytest.raises(ValueError, match="expected config_dict_or_path to be a dict or the path of a JSON file"):
            settings_from(config, dtype=None, remote_device=None)


@pytest.mark.parametrize(
    ("config", "argument", "pins"),
    [
        (None, False, False),
        (None, True, True),
        ({}, False, True),
        ({"pin_memory": False}, False, False),
        ({"pin_memory": False}, True, True),
        ({"pin_memory": "auto"}, False, True),
    ],
)
def test_memory_is_pinned_as_the_argument_or_the_config_says(config, argument, pins) -> None:
    if config is not None:
        config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x", **config}}}
    settings = settings_from(config, argument, dtype=None, remote_device=None if config else "cpu")
    assert settings.pins is pins
    assert [disk.pins for disk in settings.disks.values()] == ([pins] if config else [])


def test_arguments_without_effect_are_named_with_what_to_write_instead() -> None:
    with mock.patch.object(build_settings, "warn_once") as said:
        say_what_has_no_effect(policy_for_stage(3), zero_quantized_weights=True, param_swapper=None)
        say_what_has_no_effect(policy_for_stage(2), zero_quantized_weights=True)
    ((message,), _), *others = said.call_args_list
    assert not others
    assert "zero_quantized_weights=..." in message
    assert "write zero_optimization.zero_quantized_weights" in message
