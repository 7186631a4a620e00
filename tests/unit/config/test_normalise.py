"""Aliases, "auto", null and keys of other people's."""

from __future__ import annotations

from typing import Any

import pytest

from craken.config import load_config
from craken.config.normalise import Findings, homes_of, normalise, slip_of
from craken.config.schema import Config
from craken.config.section import keys_of


def _notices(given: dict[str, Any]) -> list[str]:
    findings = Findings()
    normalise(Config, given, "", findings)
    assert not findings.problems
    return findings.notices


@pytest.mark.parametrize("unset", ["auto", None])
def test_auto_and_null_mean_the_default(unset: Any) -> None:
    config = load_config(
        {
            "train_batch_size": unset,
            "gradient_clipping": unset,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": unset, "offload_optimizer": {"device": unset}},
            "fp16": {"enabled": unset, "loss_scale_window": unset},
            "optimizer": unset,
            "bf16": unset,
        }
    )
    assert config.train_batch_size is None
    assert config.gradient_clipping == 1.0
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.zero_optimization.offload_optimizer.device == "none"
    assert config.fp16.enabled is config.bf16.enabled is False
    assert config.optimizer is None


def test_auto_leaves_the_arguments_of_optimizer_and_schedule() -> None:
    config = load_config(
        {
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_min_lr": 0}},
        }
    )
    assert config.optimizer is not None
    assert config.scheduler is not None
    assert config.optimizer.params == {"betas": [0.9, 0.95]}
    assert config.scheduler.params == {"warmup_min_lr": 0}


def test_stage_auto_says_that_stage_0_is_used() -> None:
    assert any("stage 0 is used" in notice for notice in _notices({"zero_optimization": {"stage": "auto"}}))


def test_sections_exist_when_they_are_not_given() -> None:
    config = load_config({})
    assert config.fp16.enabled is False
    assert config.zero_optimization.offload_param.device == "none"
    assert config.optimizer is config.scheduler is None


def test_a_config_cannot_be_changed() -> None:
    config = load_config({})
    with pytest.raises(ValueError, match="frozen"):
        config.train_batch_size = 3
    with pytest.raises(ValueError, match="frozen"):
        config.fp16.enabled = True


@pytest.mark.parametrize(
    "key", ["my_own_key", "msamp", "zero_optimization.reduce_bucket_size", "fp8", "checkpoint_dir"]
)
def test_a_foreign_top_level_key_is_left_alone_with_a_notice(key: str) -> None:
    assert _notices({key: {"any": "thing"}})[0].startswith(f'unknown top-level key "{key}" is left alone')


def test_a_section_key_at_the_top_level_is_told_where_it_belongs() -> None:
    assert 'did you mean "zero_optimization.reduce_bucket_size"?' in _notices({"reduce_bucket_size": 5e8})[0]
    assert 'did you mean "optimizer.params.lr"?' in _notices({"lr": 5e8})[0]


def test_a_word_of_a_known_key_is_told_the_whole_key() -> None:
    assert _notices({"zero": {"stage": 2}})[0].endswith('is left alone; did you mean "zero_optimization"?')
    assert _notices({"batch_size": 2})[0].endswith('is left alone; did you mean "train_batch_size"?')


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("Train_Batch_Size", "train_batch_size"),
        ("trainBatchSize", "train_batch_size"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("grad_clipping", "gradient_clipping"),
        ("model", None),
        ("lr", None),
        ("gradient.clipping", None),
    ],
)
def test_slips_are_told_from_foreign_keys(key: str, meant: str | None) -> None:
    assert slip_of(key, keys_of(Config)) == meant


def test_no_known_top_level_key_is_a_slip_of_another_section_key() -> None:
    for key in keys_of(Config):
        assert slip_of(key, keys_of(Config)) == key


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="3: expected a known key"):
        load_config({3: 1})  # type: ignore[dict-item]


def test_the_homes_of_a_key_are_looked_for_near_by_first() -> None:
    offloads = ["zero_optimization.offload_param.pin_memory", "zero_optimization.offload_optimizer.pin_memory"]
    assert homes_of("pin_memory") == [*offloads, "data_efficiency.data_sampling.pin_memory"]
    assert homes_of("pin_memory", "zero_optimization") == offloads
    assert homes_of("enabled") == []


def test_foreign_keys_are_warned_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("craken.config.load.warn_once", said.append)
    load_config({"my_own_key": 1, "train_batch_size": 2})
    assert said == ['configuration: unknown top-level key "my_own_key" is left alone']
