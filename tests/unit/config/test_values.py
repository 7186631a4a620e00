"""Kinds of value: what each takes, and what it says about the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craken.config import load_config
from craken.config.values import nearest, plain


@given(st.integers(1, 10**15))
def test_floats_without_fraction_count_as_whole_numbers(size: int) -> None:
    config = load_config({"zero_optimization": {"reduce_bucket_size": float(size)}})
    assert config.zero_optimization.reduce_bucket_size == int(float(size))
    assert type(config.zero_optimization.reduce_bucket_size) is int


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_other_floats_are_refused(size: float) -> None:
    if math.isfinite(size) and size == int(size) and size >= 1:
        return
    with pytest.raises(ValueError, match="reduce_bucket_size: expected a whole number >= 1"):
        load_config({"zero_optimization": {"reduce_bucket_size": size}})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(st.sampled_from(["zero_optimization", "fp16", "train_batch_size", "optimizer", "steps_per_print"]), json_values)
def test_no_json_value_leads_to_another_error_than_the_report(key: str, value: Any) -> None:
    message = ""
    try:
        load_config({key: value})
    except ValueError as error:
        message = str(error)
    assert not message or (message.startswith("configuration: ") and key in message)


def test_numbers_of_numpy_are_numbers() -> None:
    config = load_config({"train_batch_size": np.int64(8), "gradient_clipping": np.float32(0.5)})
    assert (config.train_batch_size, config.gradient_clipping) == (8, 0.5)


@pytest.mark.parametrize(
    ("given_steps", "steps"), [(10, 10), (10.0, 10), (math.inf, None), ("auto", None), (None, None)]
)
def test_steps_per_print_can_be_inf_for_never(given_steps: Any, steps: int | None) -> None:
    assert load_config({"steps_per_print": given_steps}).steps_per_print == steps


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_every_spelling_of_a_dtype_gives_the_short_one(name: str) -> None:
    config = load_config({"communication_data_type": name, "data_types": {"grad_accum_dtype": name}})
    assert config.communication_data_type == config.data_types.grad_accum_dtype == "bf16"


def test_choices_take_any_case() -> None:
    assert load_config({"checkpoint": {"tag_validation": "WARN"}}).checkpoint.tag_validation == "warn"


def test_one_name_counts_as_a_list_of_one() -> None:
    leaf = load_config({"zero_optimization": {"leaf_module": {"names": "mlp"}}}).zero_optimization.leaf_module
    assert leaf.names == ["mlp"]


def test_nearest_prefers_the_same_letters() -> None:
    assert nearest("Reduce-Bucket-Size", ["reduce_scatter", "reduce_bucket_size"]) == "reduce_bucket_size"
    assert nearest("xyz", ["reduce_scatter"]) is None
    assert plain("Ab_c-1") == "abc1"
