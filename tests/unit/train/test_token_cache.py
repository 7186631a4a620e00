"""Text becomes tokens once, whole or not at all, and the same tokens in every run."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from craken.train import token_cache, tokenizer

TEXT = "def add(left, right):\n    return left + right\n\n\nnumbers = [1, 2, 3]  # größer, 日本\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"module{number}.py").write_text(TEXT * (number + 1), "utf-8")
    return folder


def _prepare(text: Path, cache: Path, *, report=lambda what, fraction: None, **source) -> token_cache.TokenCache:
    return token_cache.prepare(text, cache, tokenizer.TokenizerSource(**{"vocab_size": 300, **source}), report=report)


def test_tokens_decode_to_the_text_they_came_from(text, tmp_path) -> None:
    entry = _prepare(text, tmp_path / "cache")
    decode = tokenizer.load_tokenizer(entry.tokenizer_file).decode
    documents = "".join(decode(list(entry.train()), skip_special_tokens=True))
    assert documents.count("def add") + decode(list(entry.held_out())).count("def add") == 78  # 1 + ... + 12
    assert "größer, 日本" in documents
    assert entry.train().dtype == np.uint16


def test_each_document_ends_with_token_zero(text, tmp_path) -> None:
    entry = _prepare(text, tmp_path / "cache")
    assert int((entry.train() == 0).sum()) == entry.meta.train_files
    assert entry.train()[-1] == 0
    assert entry.meta.train_files + entry.meta.held_out_files == 12


def test_a_second_run_reads_what_the_first_wrote(text, tmp_path) -> None:
    first = _prepare(text, tmp_path / "cache")
    said: list[str] = []
    second = _prepare(text, tmp_path / "cache", report=lambda what, fraction: said.append(what))
    assert second == first
    assert said == []


def test_other_settings_or_other_text_make_another_entry(text, tmp_path) -> None:
    first = _prepare(text, tmp_path / "cache")
    assert _prepare(text, tmp_path / "cache", vocab_size=280).folder != first.folder
    (text / "module0.py").write_text("pass\n" * 40)
    assert _prepare(text, tmp_path / "cache").folder != first.folder


def test_an_existing_tokenizer_is_used_as_it_is(text, tmp_path) -> None:
    first = _prepare(text, tmp_path / "cache")
    second = _prepare(text, tmp_path / "cache2", file=first.tokenizer_file, vocab_size=9999)
    assert second.meta.vocab_size == first.meta.vocab_size
    assert np.array_equal(second.train(), first.train())


def test_an_existing_tokenizer_without_an_end_of_text_joins_documents_as_they_are(text, tmp_path) -> None:
    first = _prepare(text, tmp_path / "cache")
    second = _prepare(text, tmp_path / "cache", file=first.tokenizer_file, end_of_text=None)
    assert second.train().tolist() == [token for token in first.train().tolist() if token != 0]


def test_a_run_that_dies_while_writing_leaves_no_entry(text, tmp_path) -> None:
    def die(what: str, fraction: float) -> None:
        if what == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _prepare(text, tmp_path / "cache", report=die)
    assert list((tmp_path / "cache").iterdir()) == []
    assert _prepare(text, tmp_path / "cache").meta.train_tokens > 0


def test_two_runs_at_once_agree_on_one_entry(text, tmp_path, monkeypatch) -> None:
    meet = threading.Barrier(2, timeout=20)
    numbers = iter((1, 2))
    monkeypatch.setattr(token_cache.os, "getpid", lambda: next(numbers))  # two processes have two

    def report(what: str, fraction: float) -> None:
        if what == "tokenising" and fraction == 1.0:
            meet.wait()

    entries: list[token_cache.TokenCache] = []
    threads = [
        threading.Thread(target=lambda: entries.append(_prepare(text, tmp_path / "cache", report=report)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries) == 2
    assert entries[0] == entries[1]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_folder_without_text_is_refused_with_an_example(tmp_path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"no text in them.*data\.bin"):
        _prepare(tmp_path / "text", tmp_path / "cache")


def test_a_vocabulary_smaller_than_all_bytes_is_refused(text, tmp_path) -> None:
    with pytest.raises(ValueError, match="--vocab-size is 100; expected at least 257"):
        _prepare(text, tmp_path / "cache", vocab_size=100)


def test_meta_counts_what_the_files_hold(text, tmp_path) -> None:
    entry = _prepare(text, tmp_path / "cache")
    meta = json.loads((entry.folder / "meta.json").read_text())
    assert (entry.folder / "train.bin").stat().st_size == 2 * meta["train_tokens"]
    assert meta["characters"] == len(TEXT) * 78
