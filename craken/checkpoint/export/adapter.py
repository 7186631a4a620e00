"""LoRA adapters: finds their matrices in a folder that PEFT wrote or among a wrapped model's weights, and adds them in.

    merged weight [out, in] = weight + scaling * B [out, r] @ A [r, in]      scaling: alpha / r, or alpha / sqrt(r)

Weights stored the other way round ([in, out]: `fan_in_fan_out`, embeddings) take the product transposed. A row of the
result needs its row of the weight and the two small matrices, so a merge streams like a copy. Sums are in fp32.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craken.checkpoint.export.weight_files import read_file
from craken.checkpoint.lazy import LazyTensor, cast

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>embedding_A|embedding_B|A|B)(?:\.(?P<adapter>[^.]+))?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>.+)")
_UNSUPPORTED = {
    "use_dora": "DoRA scales rows by their norm",
    "use_qalora": "QA-LoRA pools the inputs",
    "lora_bias": "its B matrices have biases",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it adapts parameters that are no layer's weight",
    "trainable_token_indices": "it trains single tokens",
    "alora_invocation_tokens": "it acts behind certain tokens only",
    "use_bdlora": "its matrices are block diagonal",
    "arrow_config": "it routes between adapters",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that alter the base weights too


@dataclass
class Adapter:
    """What an adapter brings: factors by module and name (A, B, embedding_A, embedding_B), and whole new tensors."""

    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)  # of the adapters they belong to, where the model has names for them


class Unwrapped(NamedTuple):
    """A wrapped model's own tensors, under the names they have without the wrapper, and its adapter."""

    base: dict[str, LazyTensor]
    adapter: Adapter


def is_wrapped(names: Mapping[str, Any]) -> bool:
    """Whether these are the names of a model with a LoRA adapter around its layers."""
    return any(".lora_" in name or ".base_layer." in name or name.startswith(_PREFIX) for name in names)


def read_config(folder: Path) -> dict[str, Any]:
    """Return `adapter_config.json`; ValueError for another kind than LoRA, or for a variant that has no plain sum."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_NAME}; expected a folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(path.read_text("utf-8"))
        kind, _ = config["peft_type"], config["lora_alpha"] if config["peft_type"] == "LORA" else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no adapter's configuration: {error!r}") from error
    if kind != "LORA":
        raise ValueError(f"{path}: expected peft_type LORA, got {kind}; merge it with PEFT's merge_and_unload")
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise ValueError(f"{path}: {key} is set ({why}), which is not merged here; use PEFT's merge_and_unload")
    return dict(config)


def read_adapter(folder: Path) -> Adapter:
    """Return the tensors of a folder that PEFT wrote; ValueError when they are missing or of an unknown kind."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        found = " (adapter_model.bin is a pickle, which is not read)" if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{folder} holds no {WEIGHTS_NAME}{found}; save the adapter with safe_serialization=True")
    adapter = Adapter()
    for name, tensor in read_file(path).items():
        if not _take(name.removeprefix(_PREFIX), tensor, adapter):
            adapter.replaced[name.removeprefix(_PREFIX)] = tensor
    return adapter


def check_initialisation(config: Mapping[str, Any]) -> None:
    """ValueError when the adapter belongs to a base model that its initialisation altered, so W itself will not do."""
    how = config.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"the adapter was initialised with {how!r}, which changed the base weights too: a sum with the untouched "
            "ones is wrong. Export a checkpoint of the whole wrapped model, or convert the adapter with PEFT first"
        )


def unwrap(tensors: Mapping[str, LazyTensor]) -> Unwrapped:
    """Take a wrapped model's tensors apart; ValueError when it carries several adapters or an unknown kind."""
    base: dict[str, LazyTensor] = {}
    adapter = Adapter()
    for name, tensor in tensors.items():
        if not _take(name.removeprefix(_PREFIX), tensor, adapter):
            base[unwrapped_name(name)] = tensor
    if len(adapter.names) > 1:
        raise ValueError(f"the checkpoint holds the adapters {sorted(adapter.names)}; expected one, or none to choose")
    return Unwrapped(base, adapter)


def unwrapped_name(name: str) -> str:
    """Return the name that a base model's tensor has without the adapter around its layer."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")


def _take(name: str, tensor: LazyTensor, adapter: Adapter) -> bool:
    """Put a tensor into `adapter` if it belongs to one; ValueError for a part that has no place in a plain sum."""
    saved = _SAVED.fullmatch(name)
    if saved:
        adapter.replaced[f"{saved['module']}.{saved['leaf']}"] = tensor
        adapter.names.add(saved["adapter"])
        return True
    if ".lora_" not in name:
        return False
    factor = _FACTOR.fullmatch(name.removesuffix(".weight"))
    if not factor or name.endswith(".bias"):
        raise ValueError(f"{name}: expected the A or B matrix of a LoRA layer; merge with PEFT's merge_and_unload")
    adapter.factors.setdefault(factor["module"], {})[factor["factor"]] = tensor
    adapter.names |= {factor["adapter"]} - {None}
    return True


def merge(
    base: Mapping[str, LazyTensor], adapter: Adapter, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """Return `base` with the adapter added in, what it changes in `dtype` (None: in that of the base weight).

    ValueError naming a module that does not fit or is not there.
    """
    merged = dict(base)
    for name, tensor in adapter.replaced.items():
        old = merged.get(name, tensor)
        if old.shape != tensor.shape:
            raise ValueError(f"{name}: the adapter has shape {tensor.shape}, the model {old.shape}")
        merged[name] = cast(name, tensor, dtype or old.dtype)
    for module, factors in adapter.factors.items():
        name = f"{module}.weight"
        if name not in merged:
            raise ValueError(
                f"the adapter has factors for {module}, but there is no {name} to add them to; it has "
                f"{', '.join(list(merged)[:3])} ...: give the base model's folder with --base, or its own checkpoint"
            )
        weight = merged[name]
        total = _sum(name, weight, _pair(module, factors), module, config)
        merged[name] = cast(name, total, dtype or weight.dtype)
    return merged


class _Pair(NamedTuple):
    """A [r, in] and B [out, r]."""

    a: LazyTensor
    b: LazyTensor
    is_embedding: bool


def _pair(module: str, factors: Mapping[str, LazyTensor]) -> _Pair:
    is_embedding = "embedding_A" in factors or "embedding_B" in factors
    names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
    if set(factors) != set(names):
        raise ValueError(f"{module}: expected the factors {' and '.join(names)}, got {sorted(factors)}")
    a, b = (factors[name] for name in names)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"{module}: expected factors [r, in] and [out, r], got {a.shape} and {b.shape}")
    return _Pair(a, b, is_embedding)


def _sum(name: str, weight: LazyTensor, pair: _Pair, module: str, config: Mapping[str, Any]) -> LazyTensor:
    out_features, in_features = pair.b.shape[0], pair.a.shape[1]
    turned = pair.is_embedding or bool(config.get("fan_in_fan_out")) or weight.shape != (out_features, in_features)
    expected = (in_features, out_features) if turned else (out_features, in_features)
    if weight.shape != expected or not weight.dtype.is_floating_point:
        raise ValueError(
            f"{name}: a {weight.dtype} weight of shape {weight.shape} cannot take factors {pair.a.shape} and "
            f"{pair.b.shape}; expected a floating-point weight [{out_features}, {in_features}] or the other way round"
        )
    scale, num_columns = _scaling(module, pair.a.shape[0], config), expected[1]

    def read(low: int, high: int) -> Tensor:
        a, b = pair.a.contiguous().float(), pair.b.contiguous().float()
        left, right = (a.T, b.T) if turned else (b, a)  # [rows, r], [r, columns]
        rows = weight.read(low, high).float().view(-1, num_columns)
        product = left[low // num_columns : high // num_columns] @ right
        return rows.add(product, alpha=scale).view(-1)

    return LazyTensor(weight.shape, torch.float32, read, num_columns)


def _scaling(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
