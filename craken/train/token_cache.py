"""Keeps tokenised text in memory-mapped files, made once for each data set and tokenizer setting.

A cache entry is a folder `<cache>/<key>/`: `tokenizer.json`, `train.bin` and `held_out.bin` (token ids end to end,
little-endian uint16 or uint32, each document closed by the end-of-text token) and `meta.json`. The key hashes the
files' names, sizes and modification times with the tokenizer's settings. An entry is written beside its place and
renamed into it, so that it is whole or absent; of two runs that make the same entry, the second to finish takes the
first one's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from craken.train import corpus
from craken.train import tokenizer as bpe
from craken.train.tokenizer import TokenizerSource

FORMAT = 2
Tokens = NDArray[np.uint16] | NDArray[np.uint32]
Report = Callable[[str, float], None]  # what is being done, the fraction done


@dataclass(frozen=True)
class CacheMeta:
    """What a cache entry holds: sizes in tokens, files and characters, and the tokens' width."""

    vocab_size: int
    dtype: str
    train_tokens: int
    held_out_tokens: int
    train_files: int
    held_out_files: int
    characters: int


@dataclass(frozen=True)
class TokenCache:
    """One finished entry; `train` and `held_out` are memory-mapped and read-only."""

    folder: Path
    meta: CacheMeta

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / "tokenizer.json"

    def train(self) -> Tokens:
        return self._map("train.bin", self.meta.train_tokens)

    def held_out(self) -> Tokens:
        return self._map("held_out.bin", self.meta.held_out_tokens)

    def _map(self, name: str, num_tokens: int) -> Tokens:
        return np.memmap(self.folder / name, dtype=np.dtype(self.meta.dtype), mode="r", shape=(num_tokens,))


def open_cache(folder: Path) -> TokenCache:
    """Open the finished entry in `folder`."""
    return TokenCache(folder, CacheMeta(**json.loads((folder / "meta.json").read_text("utf-8"))))


def prepare(data: Path | None, cache: Path, source: TokenizerSource, *, report: Report) -> TokenCache:
    """Return the entry for this text and tokenizer, tokenising first where there is none yet.

    Raises ValueError when there is no text.
    """
    files = corpus.find_files(data)
    folder = cache / _key(files, source)
    if not (folder / "meta.json").exists():
        _make_entry(files, folder, source, report=report)
    return open_cache(folder)


def _key(files: list[corpus.TextFile], source: TokenizerSource) -> str:
    content = f"{FORMAT} {corpus.fingerprint(files)} ".encode() + source.settings()
    return hashlib.blake2b(content, digest_size=12).hexdigest()


def _make_entry(files: list[corpus.TextFile], folder: Path, source: TokenizerSource, *, report: Report) -> None:
    report("reading text", 0.0)
    documents = list(corpus.read_documents(files))
    if not any(not document.is_held_out for document in documents):
        raise ValueError(
            f"found {len(files)} file(s) but no text in them; expected UTF-8 files of more than a line, "
            f"for instance {files[0].path}; name another place with --data"
        )
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_entry(documents, partial, source, report=report)
        with contextlib.suppress(OSError):  # another run was first: its entry is the same as ours
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_entry(documents: list[corpus.Document], folder: Path, source: TokenizerSource, *, report: Report) -> None:
    if source.file is None:
        report("training the tokenizer", 0.0)
        mixed = sorted(documents, key=lambda document: corpus.name_hash(document.name))
        tokenizer = bpe.train_tokenizer(bpe.sample(d.text for d in mixed if not d.is_held_out), source.vocab_size)
    else:
        tokenizer = bpe.load_tokenizer(source.file)
    end = [] if source.end_of_text is None else [tokenizer.token_to_id(source.end_of_text)]
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    characters = sum(len(document.text) for document in documents)
    counts: dict[str, int] = {}
    done = 0
    for name, is_held_out in (("train", False), ("held_out", True)):
        texts = [document.text for document in documents if document.is_held_out is is_held_out]
        with (folder / f"{name}.bin").open("wb") as out:
            counts[f"{name}_files"], counts[f"{name}_tokens"] = len(texts), 0
            for batch in bpe.batches_of(texts):
                counts[f"{name}_tokens"] += _write_tokens(out, bpe.encode(tokenizer, batch), end, dtype)
                done += sum(map(len, batch))
                report("tokenising", done / characters)
    meta = CacheMeta(vocab_size=vocab_size, dtype=dtype, characters=characters, **counts)
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=2) + "\n", "utf-8")


def _write_tokens(out: BinaryIO, documents: list[list[int]], end: list[int], dtype: str) -> int:
    ids = [token for document in documents for token in (*document, *end)]
    out.write(np.asarray(ids, dtype=dtype).tobytes())
    return len(ids)
