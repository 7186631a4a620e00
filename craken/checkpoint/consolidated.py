"""The weights and buffers of a checkpoint under the names they have in the module, each read when it is wanted."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from craken.checkpoint.folder import has_latest
from craken.checkpoint.index import INDEX_NAME
from craken.checkpoint.lazy import LazyTensor
from craken.checkpoint.place import Place, is_file, place_of
from craken.checkpoint.reader import Reader
from craken.spec import BUFFER, FROZEN, WEIGHT, ShardSpec

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile, activation checkpointing


@dataclass(frozen=True)
class Consolidated:
    """A checkpoint's tensors by name, in the order they were saved; `tied` says which other name means the same one."""

    path: Place
    tensors: dict[str, LazyTensor]
    kinds: dict[str, str]  # name -> WEIGHT, FROZEN or BUFFER
    tied: dict[str, str]  # another name -> the name in `tensors`


def open_reader(checkpoint: str | os.PathLike[str], tag: str | None = None) -> Reader:
    """Open the folder that was saved to (`tag=None`: its `latest`), a tag's folder in it, or `craken train`'s output.

    CheckpointNotFound lists the tags that exist; CheckpointDamaged names a damaged file; ValueError when `tag` is
    another than that of the folder given.
    """
    folder, name = locate(checkpoint, tag)
    return Reader(folder, name)


def locate(checkpoint: str | os.PathLike[str], tag: str | None) -> tuple[Place, str | None]:
    """Return the folder of tags and the tag (None: `latest`) that a path or a URL given by a user means."""
    place = place_of(os.path.expanduser(checkpoint))
    if is_file(place / INDEX_NAME):
        own = place.resolve() if isinstance(place, Path) else place
        if tag not in (None, own.name):
            raise ValueError(f"{place} is the checkpoint {own.name!r} itself; give its parent folder to choose {tag!r}")
        return place.parent if place.name else own.parent, own.name
    within = place / "checkpoints"
    if has_latest(within) and not has_latest(place):
        return within, tag
    return place, tag


def consolidate(reader: Reader, *, includes_frozen: bool = True) -> Consolidated:
    """Return the module's weights and kept buffers; ValueError when the checkpoint was not saved by an engine."""
    kinds: dict[str, str] = {}
    for kind in (WEIGHT, FROZEN, BUFFER) if includes_frozen else (WEIGHT, BUFFER):
        kinds |= dict.fromkeys(reader.names(kind), kind)
    if not kinds:
        raise ValueError(
            f"{reader.path} holds no weights, only the kinds {reader.kinds()}; expected a checkpoint that an engine's "
            "save_checkpoint wrote"
        )
    tensors = {_plain(name): _lazy(reader, kind, name) for name, kind in kinds.items()}
    tied = {_plain(other): _plain(name) for other, name in (reader.shared_value("tied") or {}).items()}
    return Consolidated(
        reader.path,
        tensors,
        {_plain(name): kind for name, kind in kinds.items()},
        {other: name for other, name in tied.items() if name in tensors},
    )


def _lazy(reader: Reader, kind: str, name: str) -> LazyTensor:
    shape, dtype = reader.shape(kind, name), reader.dtype(kind, name)

    def read(low: int, high: int) -> Tensor:
        out = torch.empty(high - low, dtype=dtype, device="cpu")
        reader.read(kind, ShardSpec(name, shape, low, high - low), out)
        return out

    return LazyTensor(shape, dtype, read)


def _plain(name: str) -> str:
    """Return a name without what wrappers around a module put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
