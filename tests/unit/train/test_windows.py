"""Windows over a token stream, the validation set and the unigram baseline."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from craken.train.windows import Windows, predicted_tokens, unigram_entropy, validation_numbers

TOKENS = np.arange(103, dtype=np.uint16)


def test_windows_lie_end_to_end_and_leave_the_remainder_out() -> None:
    windows = Windows(TOKENS, 10)
    assert len(windows) == 10
    assert torch.equal(windows[3]["input_ids"], torch.arange(30, 40))
    assert windows[3]["labels"].dtype == torch.int64


def test_a_seed_numbers_the_windows_anew_and_loses_none() -> None:
    plain, mixed, again = Windows(TOKENS, 10), Windows(TOKENS, 10, seed=5), Windows(TOKENS, 10, seed=5)
    first = [int(mixed[number]["input_ids"][0]) for number in range(10)]
    assert first == [int(again[number]["input_ids"][0]) for number in range(10)]
    assert first != [int(plain[number]["input_ids"][0]) for number in range(10)]
    assert sorted(first) == list(range(0, 100, 10))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_rank_validates_on_as_many_windows_and_none_twice(num_ranks) -> None:
    numbers = validation_numbers(1000, 64, num_ranks)
    assert numbers.shape == (num_ranks, 64 // num_ranks)
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.max() > 900  # spread over the whole text


def test_the_predicted_tokens_are_all_but_each_windows_first() -> None:
    numbers = np.array([[0, 2], [1, 3]])
    assert predicted_tokens(Windows(TOKENS, 4), numbers).tolist() == [1, 2, 3, 9, 10, 11, 5, 6, 7, 13, 14, 15]


def test_unigram_entropy_is_that_of_the_smoothed_frequencies() -> None:
    train = np.array([0, 0, 0, 1], dtype=np.uint16)  # smoothed: 4/7, 2/7, 1/7
    held_out = np.array([0, 1, 2])
    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_entropy(train, held_out, vocab_size=3) == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_uniform_text_is_the_logarithm_of_the_vocabulary() -> None:
    train = np.tile(np.arange(50, dtype=np.uint16), 20)
    assert unigram_entropy(train, np.arange(50), vocab_size=50) == pytest.approx(math.log(50))
