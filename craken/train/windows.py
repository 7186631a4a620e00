"""Cuts token streams into windows to train and to validate on, and measures what token frequencies alone reach."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from craken.train.token_cache import Tokens

Batch = dict[str, Tensor]


class Windows(Dataset[Batch]):
    """A token stream as windows of `seq_len` tokens end to end; a remainder at the end is left out.

    A window is `input_ids` and `labels`, both [seq_len] and the same: the model shifts the labels itself. With a `seed`
    the windows are numbered in a random order that depends on it alone.
    """

    def __init__(self, tokens: Tokens, seq_len: int, *, seed: int | None = None) -> None:
        self._tokens, self._seq_len = tokens, seq_len
        self._numbers = None if seed is None else np.random.default_rng(seed).permutation(len(self))

    def __len__(self) -> int:
        return len(self._tokens) // self._seq_len

    def __getitem__(self, index: int) -> Batch:
        ids = torch.from_numpy(self.ids(index if self._numbers is None else int(self._numbers[index])))
        return {"input_ids": ids, "labels": ids}

    def ids(self, number: int) -> NDArray[np.int64]:
        """Return the `number`-th window of the stream: [seq_len]."""
        start = number * self._seq_len
        return np.array(self._tokens[start : start + self._seq_len], dtype=np.int64)

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """Return windows of the stream side by side: `input_ids` and `labels`, both [len(numbers), seq_len]."""
        ids = torch.from_numpy(np.stack([self.ids(int(number)) for number in numbers]))
        return {"input_ids": ids, "labels": ids}


def validation_numbers(num_windows: int, max_windows: int, num_ranks: int) -> NDArray[np.int64]:
    """Return windows spread evenly over the held-out text, as many for each rank: [num_ranks, windows_per_rank].

    Which windows are chosen does not depend on the number of ranks, but for a remainder that is left out.
    """
    chosen: NDArray[np.int64] = np.linspace(0, num_windows - 1, min(max_windows, num_windows)).astype(np.int64)
    per_rank = len(chosen) // num_ranks
    dealt: NDArray[np.int64] = chosen[: per_rank * num_ranks].reshape(per_rank, num_ranks).T
    return dealt


def predicted_tokens(windows: Windows, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens that a model is asked for in these windows: every one but each window's first."""
    return np.concatenate([windows.ids(int(number))[1:] for number in numbers.reshape(-1)])


def unigram_entropy(train: Tokens, held_out: NDArray[np.int64], vocab_size: int) -> float:
    """Return the nats a token that a model knowing only how frequent tokens are in `train` needs on `held_out`.

    Counts are smoothed by one, so that a token never seen in training costs much but not infinity.
    """
    counts = np.bincount(train, minlength=vocab_size).astype(np.float64) + 1.0  # [vocab_size]
    nats = np.log(counts.sum()) - np.log(counts)  # [vocab_size]
    return float(nats[held_out].mean())
