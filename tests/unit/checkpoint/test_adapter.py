"""Merged adapters: the formula, the names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from craken.checkpoint import lazy
from craken.checkpoint.export import adapter as adapters
from craken.checkpoint.lazy import of_tensor
from tests.unit.checkpoint.models import Tensors, two_layers, write_json
from tests.unit.checkpoint.ranks import numbers

PROJ = "layers.0.proj"


def config(**more: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "lora_alpha": 6, "r": 2, "init_lora_weights": True, **more}


def factors(module: str = PROJ, out: int = 8, into: int = 6, rank: int = 2) -> Tensors:
    stem = f"base_model.model.{module}"
    return {
        f"{stem}.lora_A.weight": numbers(rank, into, seed=20),
        f"{stem}.lora_B.weight": numbers(out, rank, seed=21),
    }


def write_adapter(folder: Path, tensors: Tensors, settings: dict[str, Any]) -> Path:
    write_json(folder / "adapter_config.json", settings)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(base: Tensors, folder: Path) -> Tensors:
    lazies = {name: of_tensor(tensor) for name, tensor in base.items()}
    found = adapters.merge(lazies, adapters.read_adapter(folder), adapters.read_config(folder))
    return {name: tensor.contiguous() for name, tensor in found.items()}


def product(tensors: Tensors, module: str = PROJ) -> Tensor:
    stem = f"base_model.model.{module}"
    return tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"proj": 10}}, 5.0),
        ({"alpha_pattern": {"roj": 10, r"layers\.0.*": 4}}, 2.0),
    ],
)
def test_a_weight_gets_the_scaled_product(tmp_path: Path, monkeypatch, settings, scale) -> None:
    monkeypatch.setattr(lazy, "CHUNK_BYTES", 4 * 13)  # two rows at a time
    base, tensors = two_layers(), factors()
    found = merged(base, write_adapter(tmp_path, tensors, config(**settings)))
    torch.testing.assert_close(found[f"{PROJ}.weight"], base[f"{PROJ}.weight"] + scale * product(tensors))
    assert all(torch.equal(found[name], base[name]) for name in base if name != f"{PROJ}.weight")


def test_the_rank_is_that_of_the_factors(tmp_path: Path) -> None:
    base, tensors = two_layers(), factors(rank=3)
    found = merged(base, write_adapter(tmp_path, tensors, config(rank_pattern={"proj": 3})))
    torch.testing.assert_close(found[f"{PROJ}.weight"], base[f"{PROJ}.weight"] + 2.0 * product(tensors))


@pytest.mark.parametrize("out", [8, 6])
def test_a_weight_stored_the_other_way_round_gets_the_product_transposed(tmp_path: Path, out) -> None:
    base, tensors = {f"{PROJ}.weight": numbers(6, out)}, factors(out=out)
    found = merged(base, write_adapter(tmp_path, tensors, config(fan_in_fan_out=True)))
    torch.testing.assert_close(found[f"{PROJ}.weight"], base[f"{PROJ}.weight"] + 3.0 * product(tensors).T)


def test_an_embedding_gets_its_product_too(tmp_path: Path) -> None:
    base, a, b = two_layers(), numbers(2, 11), numbers(6, 2, seed=9)
    stem = "base_model.model.embed"
    folder = write_adapter(tmp_path, {f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b}, config())
    torch.testing.assert_close(merged(base, folder)["embed.weight"], base["embed.weight"] + 3.0 * (b @ a).T)


def test_whole_layers_that_were_trained_replace_the_base_ones(tmp_path: Path) -> None:
    new = numbers(11, 6, seed=50)
    folder = write_adapter(tmp_path, {**factors(), "base_model.model.embed.weight": new}, config())
    assert torch.equal(merged(two_layers(), folder)["embed.weight"], new)


def test_a_wrapped_model_is_taken_apart() -> None:
    names = {
        "base_model.model.layers.0.proj.base_layer.weight": "weight",
        "base_model.model.layers.0.proj.base_layer.bias": "bias",
        "base_model.model.layers.0.proj.lora_A.default.weight": "a",
        "base_model.model.layers.0.proj.lora_B.default.weight": "b",
        "base_model.model.embed.lora_embedding_A.default": "ea",
        "base_model.model.embed.lora_embedding_B.default": "eb",
        "base_model.model.head.original_module.weight": "old",
        "base_model.model.head.modules_to_save.default.weight": "new",
        "base_model.model.norm.weight": "norm",
    }
    assert adapters.is_wrapped(names)
    assert not adapters.is_wrapped(two_layers())
    tensors = {name: of_tensor(torch.tensor(float(i))) for i, name in enumerate(names)}
    base, adapter = adapters.unwrap(tensors)
    assert list(base) == ["layers.0.proj.weight", "layers.0.proj.bias", "head.weight", "norm.weight"]
    assert {module: set(found) for module, found in adapter.factors.items()} == {
        "layers.0.proj": {"A", "B"},
        "embed": {"embedding_A", "embedding_B"},
    }
    assert adapter.replaced["head.weight"].contiguous() == 7.0


def test_several_adapters_are_refused() -> None:
    one = of_tensor(torch.zeros(2, 2))
    names = [f"base_model.model.x.lora_{factor}.{name}.weight" for factor in "AB" for name in ("default", "other")]
    with pytest.raises(ValueError, match=r"adapters \['default', 'other'\]"):
        adapters.unwrap(dict.fromkeys(names, one))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "expected peft_type LORA, got LOHA"),
        ({"use_dora": True}, "use_dora is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"target_parameters": ["experts.down"]}, "target_parameters is set"),
        ({"trainable_token_indices": [3]}, "trains single tokens"),
    ],
)
def test_other_kinds_of_adapters_are_refused(tmp_path: Path, settings, message) -> None:
    write_json(tmp_path / "adapter_config.json", config(**settings))
    with pytest.raises(ValueError, match=message):
        adapters.read_config(tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapter_config.json"):
        adapters.read_config(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="a pickle, which is not read"):
        adapters.read_adapter(tmp_path)
    write_json(tmp_path / "adapter_config.json", {"r": 1})
    with pytest.raises(ValueError, match="no adapter's configuration"):
        adapters.read_config(tmp_path)


def test_an_initialisation_that_changed_the_base_is_refused() -> None:
    adapters.check_initialisation(config(init_lora_weights="gaussian"))
    with pytest.raises(ValueError, match="'pissa_niter_4', which changed the base weights"):
        adapters.check_initialisation(config(init_lora_weights="pissa_niter_4"))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (factors("layers.9.proj"), "no layers.9.proj.weight to add them to"),
        (factors(out=9), r"layers.0.proj.weight.*cannot take factors \(2, 6\) and \(9, 2\)"),
        ({f"base_model.model.{PROJ}.lora_A.weight": numbers(2, 6)}, r"expected the factors A and B, got \['A'\]"),
        ({f"base_model.model.{PROJ}.lora_B.bias": numbers(8)}, "expected the A or B matrix"),
        ({f"base_model.model.{PROJ}.lora_magnitude_vector": numbers(8)}, "expected the A or B matrix"),
        ({"base_model.model.embed.weight": numbers(12, 6)}, r"shape \(12, 6\), the model \(11, 6\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, tensors, message) -> None:
    with pytest.raises(ValueError, match=message):
        merged(two_layers(), write_adapter(tmp_path, tensors, config()))
