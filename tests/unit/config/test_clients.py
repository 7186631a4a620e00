"""The dictionaries that accelerate, the Hugging Face Trainer and TRL hand over."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

from craken.config import load_config, resolve_batch
from tests.clients.auto_configs import trainer_config


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("craken.config.load.warn_once", lines.append)
    return lines


def accelerate_dict(stage: int) -> dict[str, Any]:
    """What accelerate generates when no JSON is named."""
    return {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 8,
        "zero_optimization": {
            "stage": stage,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": {"device": "none", "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_clipping": 0.3,
        "steps_per_print": math.inf,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False, "auto_cast": True},
        "zero_allow_untested_optimizer": False,
    }


TRAINER = trainer_config(3, "cpu")
TRAINER["fp16"]["loss_scale_window"] = 1000
TRAINER["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = "auto"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_dict_that_accelerate_generates_is_taken_in_silence(stage: int, said: list[str]) -> None:
    given = accelerate_dict(stage)
    config = load_config(given)
    assert config.raw is given
    assert given == accelerate_dict(stage)
    assert config.steps_per_print is None
    assert config.zero_optimization.stage == stage
    assert config.zero_optimization.offload_optimizer.nvme_path is None
    assert resolve_batch(config, 2) == (64, 4, 8)
    assert said == []


def test_the_trainers_dict_full_of_auto_is_taken(said: list[str]) -> None:
    given = copy.deepcopy(TRAINER)
    config = load_config(given)
    assert given == TRAINER
    assert config.optimizer is not None
    assert config.optimizer.params == {}
    assert config.train_batch_size is None
    assert config.zero_optimization.sub_group_size == 1_000_000_000
    assert config.zero_optimization.stage3_prefetch_bucket_size == 50_000_000
    assert said == []


def test_the_trainers_dict_after_it_is_filled_is_taken() -> None:
    given = copy.deepcopy(TRAINER)
    given["zero_optimization"].update(reduce_bucket_size=4096 * 4096, stage3_prefetch_bucket_size=int(0.9 * 4096**2))
    given["optimizer"]["params"] = {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-08, "weight_decay": 0.0}
    given["scheduler"]["params"] = {
        "warmup_min_lr": 0,
        "warmup_max_lr": 5e-5,
        "warmup_num_steps": 1,
        "total_num_steps": 10,
    }
    given.update(train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=1, train_batch_size=16)
    assert resolve_batch(load_config(given), 2) == (16, 8, 1)


def test_the_leftovers_of_trl_are_taken_and_its_dotted_keys_left_alone(said: list[str]) -> None:
    given = {
        **accelerate_dict(3),
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "zero_optimization.reduce_bucket_size": 64.0 * 64.0,
        "zero_optimization.stage3_param_persistence_threshold": 640.0,
        "zero_optimization.stage3_prefetch_bucket_size": 0.9 * 64 * 64,
    }
    config = load_config(given)
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert len(said) == 3
    assert all("is left alone" in line for line in said)


def test_other_keys_of_the_clients_templates_are_taken() -> None:
    config = load_config(
        {
            "optimizer": {"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": True, "lr": 1e-3}},
            "zero_optimization": {
                "stage": 2,
                "allgather_partitions": True,
                "allgather_bucket_size": 2e8,
                "overlap_comm": True,
                "reduce_scatter": True,
                "reduce_bucket_size": 2e8,
                "contiguous_gradients": True,
            },
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"use_node_local_storage": True},
            "tensor_parallel": {"autotp_size": 1},
            "inference": {"tensor_parallel": {"tp_size": 1}},
            "communication_data_type": "fp32",
            "msamp": {"enabled": True, "opt_level": "O2"},
        }
    )
    assert config.zero_optimization.allgather_bucket_size == 200_000_000
    assert config.inference == {"tensor_parallel": {"tp_size": 1}}
