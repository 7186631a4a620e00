"""Finds a model's configuration and tokenizer beside its weights, and passes them on with what an export changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from craken.checkpoint.folder import write_durably
from craken.checkpoint.place import Place

CONFIG_NAME = "config.json"
_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "*processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)


def find(checkpoint: Place, given: Path | None, others: Iterable[Path] = ()) -> Path | None:
    """Return the folder that has the model's config.json: `given`, or one near the tag's folder `checkpoint`.

    Looked through: the tag's folder, the one that was saved to, the one around it, a folder `model` in any of these
    (as `craken train` leaves them), then `others`. ValueError when `given` has none.
    """
    if given is not None:
        if not (given / CONFIG_NAME).is_file():
            raise ValueError(f"--model-files {given}: expected a folder that holds {CONFIG_NAME}")
        return given
    near: list[Path] = []
    if isinstance(checkpoint, Path):
        own = checkpoint.resolve()
        near = [own, own.parent, own.parent / "model", own.parent.parent, own.parent.parent / "model"]
    return next((folder for folder in (*near, *others) if (folder / CONFIG_NAME).is_file()), None)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of `folder`; ValueError when it is no JSON object."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def pass_on(source: Path, target: Path, changes: Mapping[str, Any], dtype: torch.dtype) -> list[str]:
    """Write config.json into `target`, saying `dtype` and `changes`, and copy what belongs beside it; return names."""
    config = read_config(source)
    text = str(dtype).removeprefix("torch.")
    # older releases call it torch_dtype; whichever the file has stays
    config |= {key: text for key in ("dtype", "torch_dtype") if key in config} or {"dtype": text}
    config |= changes
    write_durably(target / CONFIG_NAME, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    names = sorted({path.name for pattern in _PATTERNS for path in source.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(source / name, target / name)
    return [CONFIG_NAME, *names]
