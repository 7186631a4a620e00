"""Safetensors files of whole models: what is written is what safetensors reads, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from craken.checkpoint.export.weight_files import parse_size, read_model, shard_names, split, write_model
from craken.checkpoint.lazy import of_tensor
from tests.unit.checkpoint.models import same, two_layers
from tests.unit.checkpoint.ranks import numbers


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("1.5gb", 1_500_000_000), ("2GiB", 2 << 30), ("300 kB", 300_000), ("4096", 4096), (7, 7)],
)
def test_sizes_are_read_as_hugging_face_writes_them(text, num_bytes) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0", "five", "5iB"])
def test_other_sizes_are_refused(text) -> None:
    with pytest.raises(ValueError, match="expected a size such as 5GB"):
        parse_size(text)


def test_shards_keep_the_order_and_the_limit() -> None:
    assert split({"a": 4, "b": 4, "c": 3, "d": 20, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert split({}, 8) == [[]]
    assert shard_names("model.safetensors", 2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert shard_names("model.safetensors", 1) == ["model.safetensors"]


def test_one_file_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = two_layers() | {"half": numbers(3).bfloat16(), "steps": torch.tensor(7), "none": torch.empty(0, 3)}
    told: list[int] = []
    written = write_model(
        tmp_path, {k: of_tensor(v) for k, v in tensors.items()}, max_shard_bytes=1 << 30, on_bytes=told.append
    )
    assert (written.files, written.num_tensors) == (["model.safetensors"], 7)
    assert sum(told) == written.num_bytes == sum(t.numel() * t.itemsize for t in tensors.values())
    assert same(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same({k: v.contiguous() for k, v in read_model(tmp_path).items()}, tensors)


def test_several_files_have_an_index(tmp_path: Path) -> None:
    tensors = two_layers()
    written = write_model(tmp_path, {k: of_tensor(v) for k, v in tensors.items()}, max_shard_bytes=300)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*written.files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written.num_bytes
    assert all((tmp_path / file).stat().st_size < 300 + 400 for file in written.files)
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    assert same({k: v.contiguous() for k, v in read_model(tmp_path).items()}, tensors)


def test_what_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor"):
        read_model(tmp_path)
    save_file(two_layers(), tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (whole[:-5], whole[:50], b"\xff" * 64, b""):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="no whole safetensors file"):
            read_model(tmp_path)
