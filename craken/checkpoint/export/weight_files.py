"""Reads and writes a model's safetensors files, whole or in shards with an index, a range at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craken.checkpoint.entry import code_of, dtype_of, memory_of
from craken.checkpoint.folder import write_durably
from craken.checkpoint.lazy import LazyTensor
from craken.disk import round_up, write_all

MODEL_NAME = "model.safetensors"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MAX_HEADER_BYTES = 100 << 20


class Written(NamedTuple):
    """What lies in a folder now: file names in order, bytes of tensors, and their number."""

    files: list[str]
    num_bytes: int
    num_tensors: int


def parse_size(text: str | int) -> int:
    """Return the bytes that `5GB` (powers of 1000), `5GiB` (powers of 1024) or `4096` mean; ValueError otherwise."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", str(text).strip(), re.IGNORECASE)
    if found and not (found[3] and not found[2]):
        units = _BINARY_UNITS if found[3] else _UNITS
        num_bytes = int(float(found[1]) * units[found[2].upper()])
        if num_bytes >= 1:
            return num_bytes
    raise ValueError(f"expected a size such as 5GB, 500MB or 2GiB, got {text!r}")


def split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names in order, in shards of at most `max_bytes`; a tensor that is larger has a shard to itself."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, num_bytes in sizes.items():
        if shards[-1] and filled + num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards


def shard_names(name: str, num_shards: int) -> list[str]:
    """Return the files' names: `name` itself, or `model-00001-of-00003.safetensors` and so on."""
    stem, _, ending = name.rpartition(".")
    if num_shards == 1:
        return [name]
    return [f"{stem}-{i:05d}-of-{num_shards:05d}.{ending}" for i in range(1, num_shards + 1)]


def write_model(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    *,
    max_shard_bytes: int,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """Write `tensors` as safetensors into `folder`, each made a range at a time, durably; an index where there are
    several files. `on_bytes` hears of progress. OSError when the disk refuses."""
    sizes = {name: tensor.num_bytes for name, tensor in tensors.items()}
    shards = split(sizes, max_shard_bytes)
    files = shard_names(MODEL_NAME, len(shards))
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, {name: tensors[name] for name in names}, on_bytes)
    if len(files) > 1:
        write_index(folder, MODEL_NAME, files, shards, sum(sizes.values()))
    return Written(files, sum(sizes.values()), len(tensors))


def write_index(folder: Path, name: str, files: list[str], shards: list[list[str]], num_bytes: int) -> None:
    """Write the index that says which file holds which tensor, as Hugging Face libraries read it."""
    places = {tensor: file for file, names in zip(files, shards, strict=True) for tensor in names}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(places.items()))}
    write_durably(folder / f"{name}.index.json", json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Mapping[str, LazyTensor], on_bytes: Callable[[int], None]) -> None:
    """Write one safetensors file and fsync it; wide dtypes lie first, so that each is aligned."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    with path.open("wb", buffering=0) as file:
        end = _append(file.fileno(), memoryview(_header(ordered)), 0)
        for tensor in ordered.values():
            for chunk in tensor.chunks():
                data = memory_of(chunk.contiguous())
                end = _append(file.fileno(), data, end)
                on_bytes(len(data))
        os.fsync(file.fileno())


def _header(tensors: Mapping[str, LazyTensor]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        fields[name] = {"dtype": code_of(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text = text.ljust(round_up(len(text), 8))
    return len(text).to_bytes(8, "little") + text


def _append(fd: int, data: memoryview, end: int) -> int:
    """Write `data` behind the `end` of a file; returns the new one."""
    try:
        write_all(fd, data, end)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)}: nothing was left behind; free space or choose another disk",
            ) from error
        raise
    return end + len(data)


def read_model(folder: Path, name: str = MODEL_NAME) -> dict[str, LazyTensor]:
    """Return the tensors of `name` in `folder`, or of the shards that `name`.index.json lists.

    FileNotFoundError when there is neither; ValueError for a file that is no safetensors.
    """
    index = folder / f"{name}.index.json"
    if (folder / name).is_file():
        return read_file(folder / name)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} holds neither {name} nor {index.name}")
    try:
        places: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of weights: {error!r}") from error
    files = {file: read_file(folder / file) for file in dict.fromkeys(places.values())}
    return {tensor: files[file][tensor] for tensor, file in places.items()}


def read_file(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of one safetensors file; ValueError when it is none, or cut short."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        text = file.read(num_bytes) if num_bytes <= _MAX_HEADER_BYTES else b""
        size = os.fstat(file.fileno()).st_size
    try:
        fields = json.loads(text)
        fields.pop("__metadata__", None)
        return {name: _stored(path, 8 + num_bytes, size, field) for name, field in fields.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _stored(path: Path, data_start: int, file_bytes: int, field: dict[str, Any]) -> LazyTensor:
    shape, dtype = tuple(field["shape"]), dtype_of(field["dtype"])
    start, end = (data_start + offset for offset in field["data_offsets"])
    if end > file_bytes or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"bytes [{start}, {end}) of {file_bytes} do not hold {shape} of {dtype}")

    def read(low: int, high: int) -> Tensor:
        out = torch.empty(high - low, dtype=dtype, device="cpu")
        with path.open("rb", buffering=0) as file:
            file.seek(start + low * dtype.itemsize)
            target = memory_of(out)
            while len(target):
                got = file.readinto(target)
                if not got:
                    raise ValueError(f"{path} was cut short while it was read")
                target = target[got:]
        return out

    return LazyTensor(shape, dtype, read)
