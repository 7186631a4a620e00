"""Turns a state (nested plain values, tensors, arrays) into JSON and named tensors, and back to exactly the same.

`None`, booleans, integers, strings, finite floats, lists and dicts with string keys are themselves in JSON. All else
is an object with the key "$": {"$": "tuple", "items": [...]}, {"$": "tensor", "name": ...}, and so on. Tensors of one
element (a parameter's step count) are in the JSON too. Only the types listed here come back, so only they go in: a
subclass or any other object is refused with its key path.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from craken.checkpoint.entry import bytes_of, can_store, code_of, dtype_of
from craken.checkpoint.errors import CheckpointDamaged

_TAG = "$"
_MAX_DEPTH = 100
_MAX_JSON_INT_BITS = 512
_INLINE_BYTES = 1024
_CONTAINERS: dict[str, type[Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, type[Any]] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_ARRAY_KINDS = "biufcmM"  # numpy's: booleans, numbers, times


class EncodedState(NamedTuple):
    """`value` goes into JSON; `tensors` (CPU or device, contiguous) are stored beside it under their names."""

    value: Any
    tensors: dict[str, Tensor]


def encode_state(state: Any, *, root: str) -> EncodedState:
    """Encode `state`, whose key paths start with `root`.

    ValueError naming the key path for a value that would not come back as it is. Tensors are borrowed, not copied;
    they come back on the CPU, without requires_grad, parameters as plain tensors. A part may be encoded already.
    """
    encoder = _Encoder()
    return EncodedState(encoder.encode(state, root), encoder.tensors)


def decode_state(value: Any, fetch: Callable[[str], Tensor]) -> Any:
    """Rebuild a state from `encode_state`'s value; `fetch` returns a stored tensor by its name.

    Whatever the value is, none but the listed types come out: CheckpointDamaged for what `encode_state` never returns,
    ValueError for a type of a newer release.
    """
    try:
        return _decode(value, fetch)
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointDamaged(f"a state is not as it was written: {error!r}; load another tag") from error


def _decode(value: Any, fetch: Callable[[str], Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, fetch) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: _decode(item, fetch) for key, item in value.items()}
    return _decode_tagged(value, fetch)


class _Encoder:
    """Walks a state; collects its tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._open: list[Any] = []  # the containers around the value at hand

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind in (int, float, complex):
            return _encode_number(value)
        if kind is list or kind in _CONTAINERS.values() or kind in _MAPPINGS.values():
            return self._container(value, path)
        if kind is EncodedState:
            return self._encoded(value, path)
        return self._leaf(value, path)

    def _container(self, value: Any, path: str) -> Any:
        if len(self._open) >= _MAX_DEPTH or any(value is outer for outer in self._open):
            raise ValueError(f"state at {path[:200]}: contains itself, or is nested deeper than {_MAX_DEPTH} levels")
        self._open.append(value)
        encoded = self._mapping(value, path) if isinstance(value, dict) else self._sequence(value, path)
        self._open.pop()
        return encoded

    def _sequence(self, values: Any, path: str) -> Any:
        kind = type(values)
        items = [self.encode(item, f"{path}[{i}]") for i, item in enumerate(values)]
        if kind is list:
            return items
        return {_TAG: kind.__name__, "items": items if kind is tuple else sorted(items, key=json.dumps)}

    def _mapping(self, value: dict[Any, Any], path: str) -> Any:
        if type(value) is dict and _TAG not in value and all(type(key) is str for key in value):
            return {key: self.encode(item, f"{path}.{key}") for key, item in value.items()}
        pairs = [
            [self.encode(key, f"{path}.{key!r} (key)"), self.encode(item, f"{path}.{key!r}")]
            for key, item in value.items()
        ]
        return {_TAG: type(value).__name__, "pairs": pairs}

    def _encoded(self, state: EncodedState, path: str) -> Any:
        if not state.tensors:
            return state.value
        return self.encode(decode_state(state.value, state.tensors.__getitem__), path)  # under names of this encoder's

    def _leaf(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic) and value.dtype.kind in _ARRAY_KINDS:
            return {_TAG: "scalar", "dtype": value.dtype.str, "data": base64.b64encode(value.tobytes()).decode()}
        if type(value) is np.ndarray and value.dtype.kind in _ARRAY_KINDS:
            name = self._store(_stored_bytes(value.tobytes()), path)
            return {_TAG: "array", "dtype": value.dtype.str, "shape": list(value.shape), "name": name}
        if type(value) in (Tensor, torch.nn.Parameter) and can_store(value):
            return self._tensor(value.detach().contiguous(), path)
        if type(value) is bytes and len(value) <= _INLINE_BYTES:
            return {_TAG: "bytes", "data": base64.b64encode(value).decode()}
        if type(value) is bytes:
            return {_TAG: "stored bytes", "name": self._store(_stored_bytes(value), path)}
        what = f"{value.dtype} {type(value).__name__}" if isinstance(value, Tensor | np.ndarray) else repr(type(value))
        raise ValueError(
            f"state at {path}: cannot store {what}; expected None, bool, int, float, complex, str, bytes, list, tuple, "
            "set, dict, OrderedDict, Counter, a dense tensor, a numpy array or scalar (no subclasses): convert it first"
        )

    def _tensor(self, tensor: Tensor, path: str) -> Any:
        if tensor.numel() != 1:
            return {_TAG: "tensor", "name": self._store(tensor, path)}
        data = base64.b64encode(bytes_of(tensor).cpu().numpy().tobytes()).decode()
        return {_TAG: "inline tensor", "dtype": code_of(tensor.dtype), "shape": list(tensor.shape), "data": data}

    def _store(self, tensor: Tensor, path: str) -> str:
        name = f"{len(self.tensors)}:{path}"  # the number keeps names apart: a key may hold a dot
        self.tensors[name] = tensor
        return name


def _stored_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _encode_number(value: float | complex) -> Any:
    if isinstance(value, complex):
        return {_TAG: "complex", "parts": [_encode_number(value.real), _encode_number(value.imag)]}
    if isinstance(value, int):
        return value if value.bit_length() <= _MAX_JSON_INT_BITS else {_TAG: "int", "hex": hex(value)}
    return value if math.isfinite(value) else {_TAG: "float", "text": repr(value)}


def _decode_tagged(value: dict[str, Any], fetch: Callable[[str], Tensor]) -> Any:
    tag = value[_TAG]
    if tag in _CONTAINERS:
        return _CONTAINERS[tag](_decode(item, fetch) for item in value["items"])
    if tag in _MAPPINGS:
        pairs = ((_decode(key, fetch), _decode(item, fetch)) for key, item in value["pairs"])
        return _MAPPINGS[tag](dict(pairs))
    if tag not in _DECODERS:
        raise ValueError(f"a state holds a value of the unknown type {tag!r}: it was written by a newer release")
    return _DECODERS[tag](value, fetch)


def _array_of(data: bytes, value: dict[str, Any], shape: list[int]) -> Any:
    """Return a writable array over `data`, if they are of a type without pointers and as many as `shape` needs."""
    code = value["dtype"]
    dtype = np.dtype(code if isinstance(code, str) else "V")
    is_shape = all(type(size) is int and size >= 0 for size in shape)
    if dtype.kind not in _ARRAY_KINDS or not is_shape or len(data) != dtype.itemsize * math.prod(shape):
        raise CheckpointDamaged(
            f"a state has {len(data)} bytes for an array of dtype {code!r} and shape {shape}; expected booleans, "
            "numbers or times, and as many bytes as they take; load another tag"
        )
    return np.ndarray(shape, dtype, buffer=bytearray(data))


def _tensor_of(value: dict[str, Any]) -> Tensor:
    """Return the tensor of one element that lies in the JSON itself."""
    try:
        data = base64.b64decode(value["data"])
        return torch.frombuffer(bytearray(data), dtype=dtype_of(value["dtype"])).view(value["shape"])
    except (ValueError, RuntimeError) as error:
        raise CheckpointDamaged(f"a state's tensor is not as it was written: {error}; load another tag") from error


_DECODERS: dict[str, Callable[[dict[str, Any], Callable[[str], Tensor]], Any]] = {
    "int": lambda value, _: int(value["hex"], 16),
    "float": lambda value, _: float(value["text"]),
    "complex": lambda value, fetch: complex(*(_decode(part, fetch) for part in value["parts"])),
    "bytes": lambda value, _: base64.b64decode(value["data"]),
    "stored bytes": lambda value, fetch: fetch(value["name"]).numpy().tobytes(),
    "scalar": lambda value, _: _array_of(base64.b64decode(value["data"]), value, [1])[0],
    "array": lambda value, fetch: _array_of(fetch(value["name"]).numpy().tobytes(), value, value["shape"]),
    "tensor": lambda value, fetch: fetch(value["name"]),
    "inline tensor": lambda value, _: _tensor_of(value),
}
