"""The configuration handed to the library: flags over the file, defaults where both are silent."""

from __future__ import annotations

import json

import pytest

from craken.config import BatchSizes, load_config, resolve_batch
from craken.train.arguments import parse, resolve
from craken.train.settings import engine_config, kept_batch, with_batch


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def _config(file: dict | None, *argv: str) -> dict:
    if file is not None:
        with open("ds.json", "w") as out:
            json.dump(file, out)
        argv = ("--config", "ds.json", *argv)
    return engine_config(resolve(parse(list(argv)), has_accelerator=False))


@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_the_configuration_from_flags_passes_the_librarys_own_check(stage) -> None:
    config = load_config(_config(None, "--zero", stage, "--precision", "fp16"))
    assert config.zero_optimization.stage == int(stage)
    assert config.fp16.enabled
    assert config.gradient_clipping == 0.3
    assert resolve_batch(config, 2).accumulation_steps == 8


def test_the_file_stands_where_flags_are_silent() -> None:
    file = {
        "train_micro_batch_size_per_gpu": 5,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.7,
        "optimizer": {"type": "Lion", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
    }
    config = _config(file)
    assert {key: config[key] for key in file} == file
    assert "zero_optimization" not in config  # stage 0, as everywhere when a file names none


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ({"bf16": True}, "bf16"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled"),
        ({"bf16": {"enabld": True}}, "bf16.enabld"),
        ({"fp16": {"loss_scal": 8}}, "fp16.loss_scal"),
        ({"optimizer": "AdamW"}, "optimizer"),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params"),
        ({"zero_optimization": 3}, "zero_optimization"),
    ],
)
def test_what_the_library_would_refuse_is_refused_before_flags_cover_it(file, path) -> None:
    with pytest.raises(ValueError, match=rf"ds.json: {path}: expected"):
        _config(file, "--zero", "2", "--precision", "fp16")


def test_older_forms_are_understood_under_flags() -> None:
    config = load_config(_config({"zero_optimization": True, "bfloat16": {"enabled": True}}, "--lr", "0.5"))
    assert config.zero_optimization.stage == 1
    assert config.bf16.enabled
    assert load_config(_config({"zero_optimization": True}, "--zero", "2")).zero_optimization.stage == 2
    assert _config({"optimizer": {"type": "AdamW", "params": None}})["optimizer"]["params"]["lr"] > 0


def test_flags_win_over_the_file() -> None:
    file = {"train_micro_batch_size_per_gpu": 5, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    config = _config(file, "--micro-batch", "4", "--zero", "1", "--precision", "fp16", "--lr", "0.5")
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["zero_optimization"]["stage"] == 1
    assert config["bf16"] == {"enabled": False}
    assert config["fp16"] == {"enabled": True}
    assert config["optimizer"]["params"]["muon_lr"] == 0.5
    file["optimizer"] = {"type": "Adam", "params": {"lr": 0.1}}
    assert _config(file, "--lr", "0.5")["optimizer"]["params"]["lr"] == 0.5


def test_an_optimizer_without_a_rate_gets_one_that_suits_it() -> None:
    adam, muon = (_config({"optimizer": {"type": name}})["optimizer"]["params"]["lr"] for name in ("AdamW", "Muon"))
    assert adam == pytest.approx(0.003)
    assert muon == 0.02


def test_auto_in_the_file_means_our_default() -> None:
    file = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    config = _config(file)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (1, 8)
    assert "train_batch_size" not in config
    assert config["optimizer"]["params"]["lr"] > 0


def test_muons_two_rates_are_rates_enough() -> None:
    params = {"muon_lr": 0.02, "adam_lr": 0.001}
    assert _config({"optimizer": {"type": "Muon", "params": params}})["optimizer"]["params"] == params


def test_a_whole_batch_in_the_file_is_left_to_the_library_to_divide() -> None:
    config = _config({"train_batch_size": 24, "gradient_accumulation_steps": 3})
    assert resolve_batch(load_config(config), 2).micro_batch_size == 4


def test_offload_is_dropped_where_a_flag_lowers_the_stage_below_it() -> None:
    file = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert "offload_optimizer" not in _config(file, "--zero", "1")["zero_optimization"]
    assert "offload_optimizer" in _config(file)["zero_optimization"]


def test_the_schedule_ends_with_the_run() -> None:
    assert _config(None, "--steps", "50")["scheduler"]["params"]["total_num_steps"] == 50


def test_old_checkpoints_are_dropped_by_the_engine_and_the_rest_of_the_section_stands() -> None:
    assert _config(None)["checkpoint"] == {"keep_last": 2}
    assert _config(None, "--keep-last", "0")["checkpoint"] == {"keep_last": None}
    file = {"checkpoint": {"async_save": True, "keep_last": 7}}
    assert _config(file)["checkpoint"] == file["checkpoint"]
    assert _config(file, "--keep-last", "3")["checkpoint"] == {"async_save": True, "keep_last": 3}
    assert load_config(_config({"checkpoint": {}})).checkpoint.keep_last == 2
    assert load_config(_config({"checkpoint": {"keep_last": None}})).checkpoint.keep_last is None


@pytest.mark.parametrize(("num_ranks", "micro", "accumulation"), [(1, 2, 16), (2, 4, 4), (4, 8, 1)])
def test_a_step_of_the_same_size_is_made_of_more_or_fewer_passes(num_ranks, micro, accumulation) -> None:
    batch = kept_batch(BatchSizes(micro * 8 * num_ranks, micro, 8), 32, num_ranks)
    assert batch == BatchSizes(32, micro, accumulation)
    assert resolve_batch(load_config(with_batch(_config(None), batch)), num_ranks) == batch


def test_a_step_that_does_not_divide_says_what_to_give() -> None:
    with pytest.raises(ValueError, match=r"takes 32 .* micro-batches of 2 on 3 ranks \(6 at a time\); give --ranks or"):
        kept_batch(BatchSizes(48, 2, 8), 32, 3)
