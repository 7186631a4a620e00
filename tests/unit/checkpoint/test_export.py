"""A checkpoint as one model: cast, merged, quantised, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from craken.checkpoint import lazy
from craken.checkpoint.export import write as exports
from craken.checkpoint.export.write import Changes, plan_export, write_export
from craken.checkpoint.lazy import LazyTensor
from tests.unit.checkpoint.models import Tensors, same, save_model, two_layers, write_json
from tests.unit.checkpoint.ranks import numbers
from tests.unit.checkpoint.test_adapter import config, factors, product, write_adapter

PROJ = "layers.0.proj"


def exported(checkpoint: Path, out: Path, files: Path | None = None, size: str = "5GB", **changes: Any) -> Tensors:
    write_export(plan_export(checkpoint, Changes(**changes), files=files), out, max_shard_size=size)
    found: Tensors = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    return found


def test_weights_come_out_as_they_were_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 40)
    frozen, buffers = {"position.weight": numbers(5, 6).bfloat16()}, {"mean": numbers(3), "steps": torch.tensor(4)}
    save_model(tmp_path / "saved", two_layers(), frozen=frozen, buffers=buffers, optimizer=two_layers())
    assert same(exported(tmp_path / "saved", tmp_path / "out"), two_layers() | frozen | buffers)
    shards = exported(tmp_path / "saved", tmp_path / "shards", size="200B")
    assert same(shards, two_layers() | frozen | buffers)
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_and_buffers_are_not(tmp_path: Path, dtype) -> None:
    buffers = {"mean": numbers(3), "steps": torch.tensor(4)}
    save_model(tmp_path / "saved", two_layers(), buffers=buffers)
    files = write_json(tmp_path / "files" / "config.json", {"model_type": "llama"}).parent
    found = exported(tmp_path / "saved", tmp_path / "out", files, dtype=dtype)
    assert same(found, {name: weight.to(dtype) for name, weight in two_layers().items()} | buffers)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told == {"model_type": "llama", "dtype": str(dtype).removeprefix("torch.")}


def test_tied_weights_are_written_once_unless_the_config_says_untied(tmp_path: Path) -> None:
    save_model(tmp_path / "saved", two_layers(), tied={"head.weight": "embed.weight"})
    assert same(exported(tmp_path / "saved", tmp_path / "once"), two_layers())
    write_json(tmp_path / "saved" / "config.json", {"tie_word_embeddings": False})
    both = two_layers() | {"head.weight": two_layers()["embed.weight"]}
    assert same(exported(tmp_path / "saved", tmp_path / "both"), both)


def test_an_adapter_of_a_folder_is_merged(tmp_path: Path) -> None:
    save_model(tmp_path / "saved", two_layers())
    adapter = write_adapter(tmp_path / "adapter", factors(), config())
    found = exported(tmp_path / "saved", tmp_path / "out", adapter=adapter)
    weight = two_layers()[f"{PROJ}.weight"] + 3.0 * product(factors())
    torch.testing.assert_close(found[f"{PROJ}.weight"], weight)
    assert set(found) == set(two_layers())
    half = exported(tmp_path / "saved", tmp_path / "half", adapter=adapter, dtype=torch.bfloat16)
    assert torch.equal(half[f"{PROJ}.weight"], found[f"{PROJ}.weight"].bfloat16())


def test_a_merged_weight_keeps_the_dtype_of_its_base(tmp_path: Path) -> None:
    base = {name: weight.bfloat16() for name, weight in two_layers().items()}
    save_model(tmp_path / "saved", {"extra": numbers(2)}, frozen=base)
    adapter = write_adapter(tmp_path / "adapter", factors(), config())
    total = base[f"{PROJ}.weight"].float() + 3.0 * product(factors())
    found = exported(tmp_path / "saved", tmp_path / "out", adapter=adapter)
    assert {weight.dtype for name, weight in found.items() if name != "extra"} == {torch.bfloat16}
    torch.testing.assert_close(found[f"{PROJ}.weight"].float(), total, rtol=2**-8, atol=0)
    whole = exported(tmp_path / "saved", tmp_path / "whole", adapter=adapter, dtype=torch.float32)
    torch.testing.assert_close(whole[f"{PROJ}.weight"], total)


def wrapped() -> tuple[Tensors, Tensors]:
    """Return (trained, frozen) as the names of a wrapped model."""
    trained = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors().items()}
    frozen = {f"base_model.model.{name}": tensor for name, tensor in two_layers().items()}
    for leaf in ("weight", "bias"):
        frozen[f"base_model.model.{PROJ}.base_layer.{leaf}"] = frozen.pop(f"base_model.model.{PROJ}.{leaf}")
    return trained, frozen


def test_an_adapter_in_the_checkpoint_is_merged_with_the_settings_beside_it(tmp_path: Path) -> None:
    trained, frozen = wrapped()
    save_model(
        tmp_path / "saved",
        trained,
        frozen=frozen,
        tied={"base_model.model.head.weight": "base_model.model.embed.weight"},
    )
    with pytest.raises(ValueError, match="LoRA adapter around its layers; merge it: --merge-adapter FOLDER"):
        exported(tmp_path / "saved", tmp_path / "out")
    write_json(tmp_path / "saved" / "adapter_config.json", config(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match=f"--merge-adapter {tmp_path / 'saved'}"):
        exported(tmp_path / "saved", tmp_path / "out")
    found = exported(tmp_path / "saved", tmp_path / "out", adapter=tmp_path / "saved")
    expected = two_layers()
    expected[f"{PROJ}.weight"] = expected[f"{PROJ}.weight"] + 3.0 * product(factors())
    assert set(found) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)


@pytest.mark.parametrize("frozen_is", ["absent", "packed", "packed as bf16"])
def test_base_weights_that_the_checkpoint_lacks_come_from_the_base_model(tmp_path: Path, frozen_is) -> None:
    trained, frozen = wrapped()
    name = f"base_model.model.{PROJ}.base_layer.weight"
    packed = {name: torch.ones(24, 1, dtype=torch.uint8 if frozen_is == "packed" else torch.bfloat16)}
    kept = None if frozen_is == "absent" else frozen | packed
    save_model(
        tmp_path / "saved", trained, frozen=kept, tied={"base_model.model.head.weight": "base_model.model.embed.weight"}
    )
    base = write_json(tmp_path / "base" / "config.json", {"model_type": "llama"}).parent
    save_file(two_layers(), base / "model.safetensors")
    adapter = write_json(tmp_path / "adapter" / "adapter_config.json", config()).parent
    with pytest.raises(ValueError, match="give the base model's folder with --base|cannot take factors"):
        exported(tmp_path / "saved", tmp_path / "out", adapter=adapter)
    found = exported(tmp_path / "saved", tmp_path / "out", adapter=adapter, base=base)
    assert set(found) == set(two_layers())
    weight = two_layers()[f"{PROJ}.weight"] + 3.0 * product(factors())
    torch.testing.assert_close(found[f"{PROJ}.weight"], weight)
    assert (tmp_path / "out" / "config.json").exists()


def test_an_adapter_on_one_of_two_tied_weights_unties_them(tmp_path: Path) -> None:
    save_model(tmp_path / "saved", two_layers(), tied={"head.weight": "embed.weight"})
    write_json(tmp_path / "saved" / "config.json", {"tie_word_embeddings": True})
    adapter = write_adapter(tmp_path / "adapter", factors("head", out=11), config())
    found = exported(tmp_path / "saved", tmp_path / "out", adapter=adapter)
    embed = two_layers()["embed.weight"]
    assert torch.equal(found["embed.weight"], embed)
    torch.testing.assert_close(found["head.weight"], embed + 3.0 * product(factors("head", out=11), "head"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_quantised_frozen_weight_without_scales_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "saved", {"a.weight": numbers(2)}, frozen={"b.weight": torch.ones(6, 1, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"b\.weight was saved quantised \(torch.uint8 \[6, 1\]\)"):
        exported(tmp_path / "saved", tmp_path / "out")


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_chosen_layers_are_quantised_and_the_rest_cast(tmp_path: Path, form) -> None:
    weights = two_layers() | {"layers.0.proj.weight": numbers(32, 64), "layers.1.proj.weight": numbers(32, 65)}
    save_model(tmp_path / "saved", weights)
    layers = ["layers.0.proj", "layers.1.proj"]
    changes = {"form": form, "dtype": torch.bfloat16, "linear_layers": lambda folder: (layers, ["head"])}
    with pytest.raises(ValueError, match=r"quantising needs the model's config\.json"):
        exported(tmp_path / "saved", tmp_path / "out", **changes)
    write_json(tmp_path / "saved" / "config.json", {})
    found = exported(tmp_path / "saved", tmp_path / "out", **changes)
    scales = "layers.0.proj.SCB" if form == "int8" else "layers.0.proj.weight.absmax"
    assert found["layers.0.proj.weight"].dtype == (torch.int8 if form == "int8" else torch.uint8)
    assert (found[scales].dtype, found["layers.0.proj.bias"].dtype) == (torch.float32, torch.bfloat16)
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    is_int8 = form == "int8"
    assert found["layers.1.proj.weight"].dtype == (torch.int8 if is_int8 else torch.bfloat16)  # 65 columns cut a block
    assert section["load_in_8bit"] == is_int8
    assert section["llm_int8_skip_modules"] == (["head"] if is_int8 else ["head", "layers.1.proj"])


def test_a_target_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "saved", two_layers())
    planned = plan_export(tmp_path / "saved", Changes())
    (tmp_path / "empty").mkdir()
    write_export(planned, tmp_path / "empty")
    for target, message in ((tmp_path / "empty", "is not empty"), (tmp_path / "file", "is a file")):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ValueError, match=message):
            write_export(planned, target)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name not in ("saved", "files")]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    save_model(tmp_path / "saved", two_layers())
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(exports.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="GB are to be written and 0.00 GB are free") as caught:
        exported(tmp_path / "saved", tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert leftovers(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "saved", two_layers())

    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    planned = plan_export(tmp_path / "saved", Changes())
    monkeypatch.setattr("craken.checkpoint.export.weight_files.write_all", full)
    with pytest.raises(OSError, match="No space left on device: nothing was left behind"):
        write_export(planned, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_damaged_block_stops_it_with_the_file_and_the_tensor(tmp_path: Path) -> None:
    path = save_model(tmp_path / "saved", two_layers()) / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rank-00001.safetensors: weight of .*are damaged"):
        exported(tmp_path / "saved", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_no_more_than_a_bounded_part_of_a_tensor_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 4 * 1000)
    weights = {"a.weight": numbers(100, 90), "b.weight": numbers(3, 500)}
    save_model(tmp_path / "saved", weights)
    adapter = write_adapter(tmp_path / "adapter", factors("a", 100, 90), config())
    planned = plan_export(tmp_path / "saved", Changes(torch.bfloat16, adapter))
    sizes = [chunk.numel() for tensor in planned.tensors.values() for chunk in LazyTensor.chunks(tensor)]
    assert max(sizes) <= 1000
    assert sum(sizes) == 100 * 90 + 3 * 500
