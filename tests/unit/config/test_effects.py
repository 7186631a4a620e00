"""Settings without effect are said to have none, once, and only when they are really set."""

from __future__ import annotations

from typing import Any

import pytest

from craken.config import load_config
from craken.config.effects import is_off


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("craken.config.load.warn_once", lines.append)
    return lines


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"zero_optimization": {"reduce_scatter": False}}, "zero_optimization.reduce_scatter = false has no effect: "),
        ({"zero_optimization": {"legacy_stage1": True}}, "zero_optimization.legacy_stage1 = true has no effect: "),
        ({"comet": {"enabled": True, "mode": "get"}}, "comet has no effect yet: "),
        ({"aio": {"block_size": 4096}, "cuda_graph": {"enabled": True}}, "cuda_graph has no effect yet: "),
        (
            {"communication_data_size": "fp16"},
            'communication_data_size = "fp16" has no effect: use communication_data_type',
        ),
        ({"amp": {"enabled": True}}, "amp has no effect: "),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel has no effect yet: "),
        (
            {"compression_training": {"row_pruning": {"shared_parameters": {"enabled": True}}}},
            "compression_training has no effect yet: ",
        ),
        ({"datastates_ckpt": {"host_cache_size": 16}}, "datastates_ckpt has no effect: "),
        (
            {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients has no effect at stage 2: it is read at stage 3 only",
        ),
        (
            {"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}},
            "zero_optimization.zero_hpz_partition_size has no effect at stage 1: it is read at stage 3 only",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "none", "nvme_path": "/local_nvme"}}},
            "zero_optimization.offload_param.nvme_path has no effect at stage 2: it is read at stage 3 only",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": 9}}},
            'zero_optimization.offload_param.buffer_count has no effect with "device": "cpu"',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pipeline_read": False}}},
            'zero_optimization.offload_optimizer.pipeline_read has no effect with "device": "cpu"',
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"nvme_path": "/local_nvme"}}},
            'zero_optimization.offload_optimizer.nvme_path has no effect with "device": "none"',
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "none", "ratio": 0.5}}},
            'zero_optimization.offload_optimizer.ratio has no effect with "device": "none"',
        ),
        (
            {"zero_optimization": {"stage": 3, "zeropp_loco_param": {"err_beta": 0.5}}},
            "zero_optimization.zeropp_loco_param has no effect without zero_quantized_gradients",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 8, "mics_hierarchical_params_gather": True}},
            "zero_optimization.mics_hierarchical_params_gather = true has no effect: ",
        ),
    ],
)
def test_a_setting_without_effect_gives_one_notice(given: dict[str, Any], line: str, said: list[str]) -> None:
    load_config(given)
    assert len(said) == 1, said
    assert said[0].startswith(f"configuration: {line}")


@pytest.mark.parametrize(
    "given",
    [
        {"zero_optimization": {"reduce_scatter": True, "contiguous_gradients": True, "allgather_partitions": True}},
        {"comet": {"enabled": False, "mode": "get"}, "wandb": {"enabled": True}},
        {"amp": {"enabled": False, "opt_level": "O1"}},
        {"elasticity": {"enabled": False, "max_gpus": 8}},
        {
            "compression_training": {
                "row_pruning": {"shared_parameters": {"enabled": False}, "different_groups": {"a": {}}}
            }
        },
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 1e8}},
        {"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "zero_hpz_partition_size": 8}},
        {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 1, "mics_shard_size": -1}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/x", "pipeline_read": False, "buffer_count": 9},
                "offload_param": {"device": "cpu", "pin_memory": False},
            }
        },
        {
            "zero_optimization": {
                "stage": 2,
                "offload_optimizer": {"device": "none", "nvme_path": "none"},
                "offload_param": {"device": "none", "nvme_path": "none"},
            }
        },
        {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False},
        {"fp16": {"enabled": True, "loss_scale": 128}, "gradient_clipping": 0.3},
    ],
)
def test_defaults_switched_off_sections_and_working_keys_are_silent(given: dict[str, Any], said: list[str]) -> None:
    load_config(given)
    assert said == []


def test_a_switch_anywhere_in_a_section_decides_whether_it_is_off() -> None:
    config = load_config({"data_efficiency": {"enabled": True}, "nebula": {}})
    assert not is_off(config.data_efficiency)
    assert is_off(config.nebula)
    assert not is_off(config.zero_optimization)
    assert not is_off(3)
