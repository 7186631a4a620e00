"""Models by name, by configuration and by folder; saved, loaded back and asked."""

from __future__ import annotations

import json

import pytest
import torch

from craken.train import huggingface, token_cache
from craken.train import tokenizer as bpe
from craken.train.presets import PRESETS

EXPECTED_MILLIONS = {"tiny": 0.1, "small": 10, "medium": 50, "large": 160}


def _llama(**changes: object) -> dict[str, object]:
    return {**PRESETS["tiny"].architecture(512, 32), **changes}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_it_says(name) -> None:
    preset = PRESETS[name]
    model = huggingface.build_model(name, vocab_size=preset.vocab_size, seq_len=preset.seq_len, device="meta")
    assert huggingface.num_parameters(model) / 1e6 == pytest.approx(EXPECTED_MILLIONS[name], rel=0.35)
    assert f"{EXPECTED_MILLIONS[name]:g} M" in preset.summary


def test_a_configuration_takes_the_vocabulary_of_the_text(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_llama(vocab_size=9999)))
    model = huggingface.build_model(str(tmp_path / "config.json"), vocab_size=300, seq_len=700, device="meta")
    assert model.config.vocab_size == 300
    assert model.config.max_position_embeddings == 700


MISTAKES = [
    ("huge", None, r"--model huge: expected a preset \(tiny, small, medium, large\)"),
    ("config.json", "{", "is not JSON"),
    ("config.json", '{"hidden_size": 3}', 'expected an object with "model_type"'),
    ("config.json", json.dumps(_llama(model_type="lama")), "transformers cannot build this model"),
    ("config.json", json.dumps(_llama(hidden_size=0, intermediate_size=0)), "no parameters|cannot build this model"),
]


@pytest.mark.parametrize(("name", "content", "words"), MISTAKES, ids=[words for *_, words in MISTAKES])
def test_a_model_that_cannot_be_is_refused_by_name(tmp_path, monkeypatch, name, content, words) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        huggingface.build_model(name, vocab_size=300, seq_len=32, device="meta")


def test_a_missing_library_names_the_extra_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    huggingface.library.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'craken\[hf\]'"):
        huggingface.library()


def test_a_saved_model_loads_back_with_its_tokenizer_and_completes(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("one two three four\n" * 200)
    source = huggingface.tokenizer_source("tiny", 300)
    cache = token_cache.prepare(tmp_path / "text.txt", tmp_path / "cache", source, report=lambda what, done: None)
    torch.manual_seed(0)
    model = huggingface.build_model("tiny", vocab_size=cache.meta.vocab_size, seq_len=32).bfloat16()
    huggingface.save_model(model, "tiny", cache.tokenizer_file, tmp_path / "model", seq_len=32)
    assert (tmp_path / "model" / "model.safetensors").exists()
    first, second = (huggingface.complete(tmp_path / "model", "one two") for _ in range(2))
    assert first == second
    assert first.prompt == "one two"

    loaded = huggingface.build_model(str(tmp_path / "model"), vocab_size=cache.meta.vocab_size, seq_len=32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_a_tokenizer_that_came_with_a_model_is_used_and_passed_on_with_its_marks(tmp_path) -> None:
    tokenizer = bpe.train_tokenizer(["some words " * 50], 280)
    wrapped = huggingface.library().PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "given")
    given = huggingface.build_model("tiny", vocab_size=len(wrapped), seq_len=32)
    given.save_pretrained(tmp_path / "given")

    source = huggingface.tokenizer_source(str(tmp_path / "given"), 9999)
    assert (source.file, source.end_of_text) == (tmp_path / "given" / "tokenizer.json", "</s>")
    huggingface.save_model(given, str(tmp_path / "given"), source.file, tmp_path / "out", seq_len=32)
    passed_on = huggingface.library().AutoTokenizer.from_pretrained(tmp_path / "out")
    assert passed_on.eos_token == "</s>"
    assert len(passed_on) == len(wrapped)


def test_weights_with_too_small_a_vocabulary_are_refused(tmp_path) -> None:
    model = huggingface.build_model("tiny", vocab_size=300, seq_len=32)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"room for 300 tokens, the tokenizer makes 400; give --vocab-size 300"):
        huggingface.build_model(str(tmp_path), vocab_size=400, seq_len=32)
