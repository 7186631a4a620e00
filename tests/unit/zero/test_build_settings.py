"""What is read of a config before it is finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from craken.zero import Keep, Place
from craken.zero.build_settings import settings_from


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
    with pytest.raises(ValueError, match="nvme_path"):
        _ = settings.disks
    assert settings_from(path, dtype=None, remote_device="none").place is Place.DEVICE


def test_anything_else_is_refused(tmp_path: Path) -> None:
    for config in (str(tmp_path / "absent.json"), 3, ["stage"]):
        with pytest.raises(ValueError, match="expected config_dict_or_path to be a dict or the path of a JSON file"):
            settings_from(config, dtype=None, remote_device=None)
