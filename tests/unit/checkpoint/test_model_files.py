"""Configuration and tokenizer: where they are looked for, and what is changed in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from craken.checkpoint.export.model_files import find, pass_on, read_config
from tests.unit.checkpoint.models import write_json


def test_they_are_found_near_the_checkpoint(tmp_path: Path) -> None:
    tag = tmp_path / "run" / "checkpoints" / "step5"
    tag.mkdir(parents=True)
    base = write_json(tmp_path / "base" / "config.json", {}).parent
    assert find(tag, None) is None
    assert find(tag, None, [base]) == base
    for folder in (tmp_path / "run" / "model", tmp_path / "run" / "checkpoints"):  # each one nearer
        write_json(folder / "config.json", {})
        assert find(tag, None, [base]) == folder
    assert find(tag, base) == base
    with pytest.raises(ValueError, match="--model-files .*expected a folder that holds config.json"):
        find(tag, tmp_path)


@pytest.mark.parametrize(("key", "other"), [("dtype", "torch_dtype"), ("torch_dtype", "dtype"), (None, "torch_dtype")])
def test_they_are_passed_on_with_the_dtype_written(tmp_path: Path, key, other) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    write_json(source / "config.json", {"model_type": "llama", **({key: "float32"} if key else {})})
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "vocab.txt",
    ):
        (source / name).write_text(name)
    for name in ("model.safetensors", "optimizer.pt", "adapter_config.json", "README.md"):
        (source / name).write_text(name)
    (source / "tokenizers").mkdir()
    names = pass_on(source, target, {"tie_word_embeddings": False}, torch.bfloat16)
    assert sorted(names) == sorted(path.name for path in target.iterdir())
    assert "model.safetensors" not in names
    assert len(names) == 6
    assert (target / "vocab.txt").read_text() == "vocab.txt"
    config = json.loads((target / "config.json").read_text())
    assert config == {"model_type": "llama", key or "dtype": "bfloat16", "tie_word_embeddings": False}
    assert other not in config


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "expected a JSON object, got list")])
def test_a_config_that_is_none_is_named(tmp_path: Path, text, message) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
