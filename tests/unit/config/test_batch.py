"""The batch triple: any two numbers give the third, and what does not fit is explained."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craken.config import BatchSizes, load_config, resolve_batch

small = st.integers(1, 64)


def _config(train: int | None = None, micro: int | None = None, steps: int | None = None) -> Any:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return load_config({key: value for key, value in zip(keys, (train, micro, steps), strict=True) if value})


@given(micro=small, steps=small, ranks=small)
def test_any_two_numbers_give_the_third(micro: int, steps: int, ranks: int) -> None:
    train = micro * steps * ranks
    expected = BatchSizes(train, micro, steps)
    assert resolve_batch(_config(train, micro), ranks) == expected
    assert resolve_batch(_config(train, None, steps), ranks) == expected
    assert resolve_batch(_config(None, micro, steps), ranks) == expected
    assert resolve_batch(_config(train, micro, steps), ranks) == expected


@given(micro=small, ranks=small)
def test_one_number_means_one_micro_batch_a_step(micro: int, ranks: int) -> None:
    expected = BatchSizes(micro * ranks, micro, 1)
    assert resolve_batch(_config(micro=micro), ranks) == expected
    assert resolve_batch(_config(train=micro * ranks), ranks) == expected


@given(train=st.integers(1, 500), micro=small, ranks=small)
def test_a_division_with_a_remainder_names_sizes_that_work(train: int, micro: int, ranks: int) -> None:
    config = _config(train, micro)
    if train % (micro * ranks) == 0:
        assert resolve_batch(config, ranks).accumulation_steps == train // (micro * ranks)
        return
    with pytest.raises(ValueError, match="expected a multiple of") as caught:
        resolve_batch(config, ranks)
    advice = str(caught.value).rsplit("write ", 1)[1]
    for size in advice.split(" or "):
        assert resolve_batch(_config(int(size), micro), ranks).train_batch_size == int(size)


def test_a_contradiction_names_the_three_numbers_and_the_ranks() -> None:
    with pytest.raises(ValueError, match="train_batch_size") as caught:
        resolve_batch(_config(32, 4, 3), 2)
    assert str(caught.value) == (
        "train_batch_size: expected train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 3 x 2 data-parallel "
        "ranks = 24, got 32; write 24, or leave one of the three keys out"
    )


def test_a_batch_that_fits_one_rank_names_the_client_that_counts_one() -> None:
    with pytest.raises(ValueError, match=r"got 12; write 24, .*; accelerate counts 1 process on CPUs, unless"):
        resolve_batch(_config(12, 4, 3), 2)


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"gradient_accumulation_steps 1 x 4 data-parallel ranks = 4 .* got 6; write 4 or 8"
    ):
        resolve_batch(_config(train=6), 4)


def test_a_batch_smaller_than_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3; write 4$"):
        resolve_batch(_config(train=3), 4)


@pytest.mark.parametrize(
    ("steps", "got"), [(None, "got none of them"), (4, "got only gradient_accumulation_steps = 4")]
)
def test_no_batch_size_at_all_is_refused(steps: int | None, got: str) -> None:
    with pytest.raises(ValueError, match="expected at least one of the two") as caught:
        resolve_batch(_config(steps=steps), 2)
    assert got in str(caught.value)


def test_zero_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="data_parallel_size: expected at least 1 rank, got 0"):
        resolve_batch(_config(train=4), 0)
