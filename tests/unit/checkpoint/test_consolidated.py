"""Weights of a checkpoint by the names they have in the module, and the paths that users give for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from craken.checkpoint import CheckpointNotFound
from craken.checkpoint.consolidated import consolidate, open_reader
from tests.unit.checkpoint.models import same, save_model, two_layers
from tests.unit.checkpoint.ranks import numbers, save_one


def test_weights_frozen_ones_and_buffers_come_together(tmp_path: Path) -> None:
    weights, frozen = two_layers(), {"position.weight": numbers(5, 6).bfloat16()}
    buffers = {"norm.mean": numbers(3), "norm.steps": torch.tensor(4)}
    states = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_model(
        tmp_path, weights, frozen=frozen, buffers=buffers, optimizer=states, tied={"head.weight": "embed.weight"}
    )
    reader = open_reader(tmp_path)
    found = consolidate(reader)
    assert same({name: t.contiguous() for name, t in found.tensors.items()}, weights | frozen | buffers)
    assert found.tied == {"head.weight": "embed.weight"}
    trained = consolidate(reader, includes_frozen=False)
    assert set(found.tensors) - set(trained.tensors) == set(frozen)


def test_names_lose_what_wrappers_put_into_them(tmp_path: Path) -> None:
    save_model(
        tmp_path,
        {"_orig_mod.layers.0._checkpoint_wrapped_module.proj.weight": numbers(2, 2)},
        tied={"_orig_mod.head.weight": "_orig_mod.layers.0._checkpoint_wrapped_module.proj.weight"},
    )
    found = consolidate(open_reader(tmp_path))
    assert (list(found.tensors), found.tied) == (["layers.0.proj.weight"], {"head.weight": "layers.0.proj.weight"})


def test_a_checkpoint_is_found_by_every_path_a_user_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for tag in ("step1", "step2"):
        save_model(folder, two_layers(), tag=tag)
    assert open_reader(folder).tag == "step2"
    assert open_reader(folder, "step1").tag == "step1"
    assert open_reader(folder / "step1").tag == "step1"
    assert open_reader(tmp_path / "run").tag == "step2"
    assert open_reader(tmp_path / "run", "step1").tag == "step1"
    monkeypatch.chdir(folder / "step1")
    assert open_reader(".").tag == "step1"
    with pytest.raises(ValueError, match="is the checkpoint 'step1' itself; give its parent"):
        open_reader(folder / "step1", "step2")
    with pytest.raises(CheckpointNotFound, match="tags that exist in it: step1, step2"):
        open_reader(folder, "step3")


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {"w": numbers(3)})
    with pytest.raises(ValueError, match=r"holds no weights, only the kinds \['param'\]"):
        consolidate(open_reader(tmp_path))


def test_what_ties_weights_is_read_without_the_other_states(tmp_path: Path) -> None:
    path = save_model(tmp_path, two_layers(), num_ranks=1, tied={"a": "embed.weight"}, client={"big": numbers(5000)})
    data = bytearray((path / "rank-00000.safetensors").read_bytes())
    at = data.find(numbers(5000).numpy().tobytes())
    data[at] ^= 1
    (path / "rank-00000.safetensors").write_bytes(data)
    reader = open_reader(tmp_path)
    assert reader.shared_value("tied") == {"a": "embed.weight"}
    assert reader.shared_value("nothing") is None
    with pytest.raises(ValueError, match="damaged"):
        reader.shared_value("client")
