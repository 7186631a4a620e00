"""States come back exactly as they went in, or do not go in at all."""

from __future__ import annotations

import base64
import enum
import functools
import json
import math
import random
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.state_codec import decode_state, encode_state


def round_trip(state: Any) -> Any:
    value, tensors = encode_state(state, root="state")
    return decode_state(json.loads(json.dumps(value, allow_nan=False)), lambda name: tensors[name].clone())


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, float | complex):
        return repr(one) == repr(other)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype.str == other.dtype.str and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True) if len(one) == len(other) else [((0, 0), (1, 1))]
        return all(same(a, b) and same(x, y) for (a, x), (b, y) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


VALUES = [
    None, True, 0, -1, 2**64, -(10**5000), 1.5, -0.0, 1e-320, math.inf, -math.inf, math.nan, 1 + 2j,
    complex(math.nan, -math.inf), "", "text \u00fc \ud800 \x00", b"", b"\x00\xff", b"x" * 5000, [], (), {}, set(),
    [1, (2, [3, (4,)])], {1: "a", "1": "b", None: 0, (1, 2): 3, 1.5: 4, b"k": 5}, {"$": "tuple", "items": []},
    {"a": {"$": 1}},
    {1, "a", (2, 3), None}, frozenset({1, 2}), OrderedDict([("b", 1), ("a", 2)]), OrderedDict([(2, OrderedDict())]),
    Counter({30: 1, 80: 2}),
    np.float32(0.1), np.int64(-3), np.bool_(True), np.datetime64("2024-02-03", "D"), np.float64("nan"),
    np.arange(6, dtype=">i4").reshape(2, 3), np.array(3.0), np.empty((0, 4), np.float16), np.asfortranarray(np.eye(3)),
    np.array(["2020-01-01"], dtype="M8[s]"), np.array([1 + 2j]),
    torch.tensor(1.0), torch.tensor([[-0.0]]), torch.tensor(2, dtype=torch.bfloat16), torch.tensor(True),
    torch.arange(6).reshape(2, 3), torch.empty(0, 2), torch.zeros(2, dtype=torch.bfloat16),
    torch.tensor([True]), torch.tensor([1 + 2j]).conj(), torch.zeros(3).to(torch.float8_e4m3fn).view(torch.uint8),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_value_comes_back_exactly(value: Any) -> None:
    assert same(round_trip({"key": [value]}), {"key": [value]})


def test_generator_states_come_back_exactly() -> None:
    numpy_state = np.random.RandomState(3).get_state()
    state = {"python": random.Random(3).getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    back = round_trip(state)
    assert same(back, state)
    random.Random().setstate(back["python"])
    np.random.RandomState().set_state(back["numpy"])
    new_style = np.random.default_rng(3).bit_generator.state
    assert same(round_trip(new_style), new_style)


def test_non_contiguous_tensors_and_parameters_come_back_as_plain_tensors() -> None:
    back = round_trip({"t": torch.arange(6).reshape(2, 3).t(), "p": torch.nn.Parameter(torch.ones(2))})
    assert torch.equal(back["t"], torch.arange(6).reshape(2, 3).t())
    assert type(back["p"]) is torch.Tensor


def test_names_of_tensors_cannot_collide() -> None:
    back = round_trip({"a": {"b": torch.tensor([1, 1])}, "a.b": torch.tensor([2, 2])})
    assert (back["a"]["b"].tolist(), back["a.b"].tolist()) == ([1, 1], [2, 2])


def test_step_counts_are_no_tensors_beside_the_json() -> None:
    steps = {
        f"w{i}": {"step": torch.tensor(float(i)), "scale": torch.full((1, 1), i, dtype=torch.bfloat16)}
        for i in range(9)
    }
    encoded = encode_state(steps, root="state")
    assert encoded.tensors == {}
    assert same(decode_state(json.loads(json.dumps(encoded.value)), encoded.tensors.__getitem__), steps)


def test_parts_that_are_encoded_already_come_back_as_what_they_were() -> None:
    parts = {"a": {"step": torch.tensor(1.0)}, "b": {"row": torch.arange(3), "step": 2}, "c": {"row": torch.arange(4)}}
    back = round_trip({name: encode_state(part, root=name) for name, part in parts.items()})
    assert same(back, parts)


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "F33"}, {"dtype": 3}, {"shape": [2]}, {"shape": "a"}, {"data": "AAA="}, {"data": ""}, {"data": "A"}],
)
def test_a_step_count_that_was_never_written_is_damage(changed: dict[str, Any]) -> None:
    encoded = encode_state(torch.tensor(3.0), root="state").value
    assert float(decode_state(encoded, {}.__getitem__)) == 3.0
    with pytest.raises(CheckpointDamaged):
        decode_state({**encoded, **changed}, {}.__getitem__)


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        object(), Color.RED, Text("a"), Point(1, 2), defaultdict(int), lambda: None, torch.float32, torch.Size([1]),
        np.array([object()]), np.array(["text"]), np.str_("a"), torch.eye(2).to_sparse(), torch.empty(1, device="meta"),
        torch.empty(1, dtype=torch.complex128), range(3), bytearray(b"a"), np.ma.masked_array([1]), torch.Generator(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_anything_else_is_refused_with_its_key_path(value: Any) -> None:
    with pytest.raises(ValueError, match=r"state at state\.opt\[1\]\.7: cannot store"):
        encode_state({"opt": [0, {7: value}]}, root="state")


def test_an_unusable_key_is_refused_with_its_path() -> None:
    with pytest.raises(ValueError, match=r"state\.a\..*\(key\): cannot store"):
        encode_state({"a": {object(): 1}}, root="state")


def test_a_state_that_contains_itself_is_refused() -> None:
    state: dict[str, Any] = {"a": []}
    state["a"] += [state, state]
    with pytest.raises(ValueError, match=r"state at state\.a\[0\]: contains itself"):
        encode_state(state, root="state")


def test_the_same_value_twice_is_no_cycle() -> None:
    shared = [1]
    assert round_trip({"a": shared, "b": shared}) == {"a": [1], "b": [1]}


def scalar(dtype: Any, num_bytes: int) -> dict[str, Any]:
    return {"$": "scalar", "dtype": dtype, "data": base64.b64encode(b"A" * num_bytes).decode()}


def array(dtype: Any, shape: Any) -> dict[str, Any]:
    return {"$": "array", "dtype": dtype, "shape": shape, "name": "16 bytes"}


@pytest.mark.parametrize(
    "value",
    [
        scalar("O", 8), scalar("O,i4", 12), scalar("(2,)O", 16), scalar(["O"], 8), scalar("V8", 8), scalar("S8", 8),
        scalar("<f4", 3), scalar("<f4", 8), scalar("<f4", 0), scalar(None, 8), array("O", [2]), array("<f8", [3]),
        array("<f8", [1]), array("<f8", [-1, -2]), array("<f8", [2.0]), array("<f8", 2), {"$": "array", "dtype": "<f8"},
        {"$": "dict", "pairs": 3}, {"$": "tuple"}, {"$": "set", "items": [[]]}, {"$": ["tuple"]},
        {"$": "int", "hex": 1},
        functools.reduce(lambda inner, _: [inner], range(5000), 0),
    ],
)  # fmt: skip
def test_what_was_never_encoded_is_damage(value: Any) -> None:
    with pytest.raises(CheckpointDamaged, match="a state "):
        decode_state({"key": value}, lambda name: torch.zeros(16, dtype=torch.uint8))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
KEYS = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
STATES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner), max_leaves=20
)


@given(STATES)
def test_any_nest_of_plain_values_comes_back_exactly(state: Any) -> None:
    assert same(round_trip(state), state)
