"""Trains a byte-level BPE tokenizer on a sample of the text: the only file that imports `tokenizers`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
SAMPLE_CHARACTERS = 6_000_000
SAMPLE_PER_DOCUMENT = 60_000
ENCODE_BATCH_CHARACTERS = 1_000_000
SMALLEST_VOCABULARY = 257  # every byte and the end-of-text mark


@dataclass(frozen=True)
class TokenizerSource:
    """Where the tokenizer comes from: trained to `vocab_size` tokens, or the existing `file` (a `tokenizer.json`).

    `end_of_text` closes every document; None where an existing tokenizer has no such token.
    """

    vocab_size: int
    file: Path | None = None
    end_of_text: str | None = END_OF_TEXT

    def settings(self) -> bytes:
        """Return what the tokens depend on besides the text."""
        content = self.file.read_bytes() if self.file else f"bpe {self.vocab_size} {SAMPLE_CHARACTERS}".encode()
        return f"{self.end_of_text} ".encode() + content


@functools.cache
def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            "craken train needs the tokenizers package, which is not installed: pip install 'craken[hf]'"
        ) from error
    return tokenizers


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Return a `tokenizers.Tokenizer` of at most `vocab_size` tokens learnt from `texts`; token 0 ends a document."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab-size is {vocab_size}; expected at least {SMALLEST_VOCABULARY} (all bytes and one mark)"
        )
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Any:
    """Return the `tokenizers.Tokenizer` that `train_tokenizer` made and someone saved at `path`."""
    return _library().Tokenizer.from_file(str(path))


def sample(texts: Iterable[str]) -> Iterator[str]:
    """Yield the beginnings of `texts` until there is enough to learn a vocabulary from."""
    remaining = SAMPLE_CHARACTERS
    for text in texts:
        if remaining <= 0:
            return
        part = text[:SAMPLE_PER_DOCUMENT]
        remaining -= len(part)
        yield part


def batches_of(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group `texts` into batches of about a million characters: enough for every core, small enough to watch."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= ENCODE_BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return each text's token ids, without the end-of-text mark; runs on all cores."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
