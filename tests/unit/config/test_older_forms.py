"""Older and misplaced forms of settings."""

from __future__ import annotations

from typing import Any

import pytest

from craken.config import load_config


@pytest.mark.parametrize(("flag", "stage"), [(True, 1), (False, 0)])
def test_zero_optimization_can_be_a_flag(flag: bool, stage: int) -> None:
    config = load_config({"zero_optimization": flag, "allgather_size": 1e6})
    assert config.zero_optimization.stage == stage
    assert config.zero_optimization.allgather_bucket_size == (1_000_000 if flag else 500_000_000)


def test_cpu_offload_means_offload_optimizer_to_cpu() -> None:
    zero = load_config({"zero_optimization": {"stage": 2, "cpu_offload": True}}).zero_optimization
    assert zero.offload_optimizer.device == "cpu"
    assert (
        load_config({"zero_optimization": {"cpu_offload": False}}).zero_optimization.offload_optimizer.device == "none"
    )


def test_cpu_offload_param_means_offload_param_to_cpu() -> None:
    zero = load_config({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}).zero_optimization
    assert zero.offload_param.device == "cpu"


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4}},
        {"partition_activations": True, "number_checkpoints": 4},
        {"partition_activations": True, "activation_checkpointing": {"number_checkpoints": 4}},
    ],
)
def test_activation_checkpointing_may_stand_inside_checkpoint(checkpoint: dict[str, Any]) -> None:
    given = {"checkpoint": {"tag_validation": "fail", **checkpoint}}
    config = load_config(given)
    assert config.activation_checkpointing.partition_activations is True
    assert config.activation_checkpointing.number_checkpoints == 4
    assert config.checkpoint.tag_validation == "fail"
    assert config.raw is given
    assert len(given["checkpoint"]) == len(checkpoint) + 1


def test_bfloat16_is_the_older_name_of_bf16() -> None:
    assert load_config({"bfloat16": {"enabled": True}}).bf16.enabled is True


def test_an_error_names_the_key_as_it_was_written() -> None:
    with pytest.raises(ValueError, match=r"^configuration: bfloat16\.enabled: expected true or false"):
        load_config({"bfloat16": {"enabled": "yes"}})
    with pytest.raises(ValueError, match=r"^configuration: checkpoint\.number_checkpoints: expected a whole number"):
        load_config({"checkpoint": {"number_checkpoints": -1}})
