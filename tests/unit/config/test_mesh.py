"""Sizes that must divide the ranks."""

from __future__ import annotations

import pytest

from craken.config import check_mesh, load_config


def zero_of(stage: int, **keys: int):
    return load_config({"zero_optimization": {"stage": stage, **keys}}).zero_optimization


@pytest.mark.parametrize("key", ["mics_shard_size", "zero_hpz_partition_size"])
def test_a_size_that_does_not_divide_names_those_that_do(key) -> None:
    with pytest.raises(ValueError, match=rf"{key} is 4, .* the 6 data-parallel ranks: choose one of 1, 2, 3, 6"):
        check_mesh(zero_of(3, **{key: 4}), 6)
    check_mesh(zero_of(3, **{key: 3}), 6)


def test_below_stage_3_second_copies_have_no_size() -> None:
    check_mesh(zero_of(2, zero_hpz_partition_size=4), 6)
