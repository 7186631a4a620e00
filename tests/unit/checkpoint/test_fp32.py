"""DeepSpeed's functions for whole fp32 weights."""

from __future__ import annotations

import inspect
import json
import logging
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from craken import cli
from craken.checkpoint import CheckpointNotFound
from craken.checkpoint.export import fp32
from craken.checkpoint.export.fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)
from tests.unit.checkpoint.models import Tensors, same, save_model


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.frozen, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.head.weight = self.embed.weight


@pytest.fixture
def model() -> Model:
    torch.manual_seed(3)
    return Model()


@pytest.fixture
def saved(tmp_path: Path, model: Model) -> Path:
    """The model in bf16 on three ranks, its buffers as they are."""
    params = {name: param.detach().bfloat16() for name, param in model.named_parameters()}
    frozen = {name: params.pop(name) for name in list(params) if name.startswith("frozen")}
    save_model(
        tmp_path / "saved",
        params,
        frozen=frozen,
        buffers=dict(model.named_buffers()),
        tied={"head.weight": "embed.weight"},
    )
    return tmp_path / "saved"


def expected(model: Model) -> Tensors:
    state = model.state_dict()
    buffers = dict(model.named_buffers())
    return {name: value if name in buffers else value.bfloat16().float() for name, value in state.items()}


def test_the_state_dict_is_whole_and_in_fp32(saved: Path, model: Model) -> None:
    state = get_fp32_state_dict_from_zero_checkpoint(str(saved))
    assert type(state) is OrderedDict
    assert same(state, expected(model))
    assert state["head.weight"] is state["embed.weight"]
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    model.load_state_dict(state, strict=True)
    trained = get_fp32_state_dict_from_zero_checkpoint(str(saved), "global_step1", exclude_frozen_parameters=True)
    assert set(state) - set(trained) == {"frozen.weight", "frozen.bias"}


def test_lazy_values_are_read_when_they_are_wanted(saved: Path, model: Model) -> None:
    state = get_fp32_state_dict_from_zero_checkpoint(saved, lazy_mode=True)
    assert all(value.dtype == torch.float32 for name, value in state.items() if not name.endswith("tracked"))
    assert state["head.weight"] is state["embed.weight"]
    assert same({name: value.contiguous() for name, value in state.items()}, expected(model))


def test_a_model_is_filled_a_shard_at_a_time(saved: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp32, "_LOADED_BYTES", 100)
    other = Model()
    assert load_state_dict_from_zero_checkpoint(other, saved) is other
    assert same(other.state_dict(), expected(model))
    assert other.head.weight is other.embed.weight


def test_names_of_one_side_only_are_told(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("craken")
    logger.addHandler(caplog.handler)
    other = Model()
    other.extra, other.norm = nn.Linear(2, 2), nn.Identity()
    load_state_dict_from_zero_checkpoint(other, saved)
    logger.removeHandler(caplog.handler)
    assert "the checkpoint lacks 2 names: extra.bias, extra.weight" in caplog.text
    assert "the model lacks 5 names: norm.bias" in caplog.text
    with pytest.raises(ValueError, match="have no name in common"):
        load_state_dict_from_zero_checkpoint(nn.Linear(2, 2), saved)
    other.embed = nn.Embedding(8, 4)
    with pytest.raises(RuntimeError, match="size mismatch for embed.weight"):
        load_state_dict_from_zero_checkpoint(other, saved)


def test_files_are_written_as_deepspeed_names_them(saved: Path, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_zero_checkpoint_to_fp32_state_dict(saved, out)
    assert [path.name for path in out.iterdir()] == ["pytorch_model.bin"]
    assert same(torch.load(out / "pytorch_model.bin", weights_only=True), expected(model))
    convert_zero_checkpoint_to_fp32_state_dict(saved, out, safe_serialization=True, exclude_frozen_parameters=True)
    found = load_file(out / "model.safetensors")
    assert not any(name.startswith(("frozen", "head")) for name in found)  # tied weights are stored once
    assert all(torch.equal(value, expected(model)[name]) for name, value in found.items())


@pytest.mark.parametrize("is_safe", [True, False])
def test_shards_have_an_index(saved: Path, model: Model, tmp_path: Path, is_safe) -> None:
    convert_zero_checkpoint_to_fp32_state_dict(saved, tmp_path, "120B", is_safe)
    name = "model.safetensors" if is_safe else "pytorch_model.bin"
    places = json.loads((tmp_path / f"{name}.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 1
    files = {file: load_file(tmp_path / file) if is_safe else torch.load(tmp_path / file) for file in places.values()}
    found = {tensor: files[file][tensor] for tensor, file in places.items()}
    assert same(found | {"head.weight": found["embed.weight"]}, expected(model))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failure_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fp32.torch, "save", refuse)
    with pytest.raises(OSError, match="No space"):
        convert_zero_checkpoint_to_fp32_state_dict(saved, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CheckpointNotFound, match="global_step1"):
        convert_zero_checkpoint_to_fp32_state_dict(saved, tmp_path / "out", tag="nope")


def test_the_script_converts_and_refuses(saved: Path, model: Model, tmp_path: Path, capsys) -> None:
    assert cli.zero_to_fp32([str(saved), str(tmp_path / "out"), "-t", "global_step1"]) == 0
    assert same(torch.load(tmp_path / "out" / "pytorch_model.bin"), expected(model))
    assert cli.zero_to_fp32([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_the_signatures_are_deepspeeds() -> None:
    functions = {
        get_fp32_state_dict_from_zero_checkpoint: {
            "checkpoint_dir": inspect.Parameter.empty,
            "tag": None,
            "exclude_frozen_parameters": False,
            "lazy_mode": False,
        },
        load_state_dict_from_zero_checkpoint: {
            "model": inspect.Parameter.empty,
            "checkpoint_dir": inspect.Parameter.empty,
            "tag": None,
        },
        convert_zero_checkpoint_to_fp32_state_dict: {
            "checkpoint_dir": inspect.Parameter.empty,
            "output_dir": inspect.Parameter.empty,
            "max_shard_size": "5GB",
            "safe_serialization": False,
            "tag": None,
            "exclude_frozen_parameters": False,
        },
    }
    for function, parameters in functions.items():
        found = {name: value.default for name, value in inspect.signature(function).parameters.items()}
        assert list(found.items()) == list(parameters.items())
