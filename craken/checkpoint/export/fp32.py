"""DeepSpeed's functions that turn a checkpoint into an fp32 state dict, and the `zero_to_fp32` script.

No ranks, no GPU, no process group: the checkpoint is read by ranges, whatever stage and number of ranks saved it.
Frozen weights and buffers that are not floating point keep their dtype.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from craken.checkpoint.consolidated import consolidate, open_reader
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.export.weight_files import parse_size, shard_names, split, write_index, write_model
from craken.checkpoint.export.write import check_space
from craken.checkpoint.folder import sync_folder
from craken.checkpoint.lazy import LazyTensor, cast
from craken.checkpoint.place import host_path
from craken.log import logger

PICKLE_NAME = "pytorch_model.bin"
_LOADED_BYTES = 2 << 30
_Module = TypeVar("_Module", bound=nn.Module)


class _Weights(NamedTuple):
    tensors: dict[str, LazyTensor]
    tied: dict[str, str]  # another name -> the name in `tensors`


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> Any:
    """Return the checkpoint's module as an OrderedDict of fp32 tensors on the CPU, as `load_state_dict` takes them.

    `tag=None` takes the one that `latest` names. Buffers are in it; tied weights are one tensor under all their names.
    `lazy_mode`: the values are not read yet; each one's `contiguous()` reads it, so one at a time fits. Raises
    CheckpointNotFound (a FileNotFoundError) and CheckpointDamaged (a ValueError).
    """
    weights = _weights(checkpoint_dir, tag, includes_frozen=not exclude_frozen_parameters)
    lazy = weights.tensors | {other: weights.tensors[name] for other, name in weights.tied.items()}
    if lazy_mode:
        return OrderedDict(lazy)
    whole = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    return OrderedDict((name, whole[weights.tied.get(name, name)]) for name in lazy)


def load_state_dict_from_zero_checkpoint(
    model: _Module, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> _Module:
    """Move `model` to the CPU, fill it with the checkpoint's fp32 weights and return it.

    Weights arrive 2 GiB at a time. Names that only one side has are warned of; ValueError when they have none in
    common, RuntimeError when a shape differs.
    """
    weights = _weights(checkpoint_dir, tag, includes_frozen=True)
    names_of: dict[str, list[str]] = {name: [name] for name in weights.tensors}
    for other, name in weights.tied.items():
        names_of[name].append(other)
    model = model.cpu()
    held = set(model.state_dict())
    saved = {name for names in names_of.values() for name in names}
    if not held & saved:
        raise ValueError(
            f"{checkpoint_dir} and {type(model).__name__} have no name in common: the checkpoint has "
            f"{', '.join(sorted(saved)[:3])} ..., the model {', '.join(sorted(held)[:3])} ..."
        )
    for shard in split({name: tensor.num_bytes for name, tensor in weights.tensors.items()}, _LOADED_BYTES):
        read = {name: weights.tensors[name].contiguous() for name in shard}
        model.load_state_dict({other: read[name] for name in shard for other in names_of[name]}, strict=False)
    for what, names in (("the checkpoint lacks", held - saved), ("the model lacks", saved - held)):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
            logger.warning(f"{checkpoint_dir}: {what} {len(names)} names: {shown}")
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the checkpoint's fp32 weights into the folder `output_dir`, beside what is in it.

    `safe_serialization`: `model.safetensors`, streamed. Without it `pytorch_model.bin`, which DeepSpeed's callers open
    next: plain tensors that `torch.load(..., weights_only=True)` takes, a shard in memory at a time. Shards and an
    index where more than `max_shard_size` is written (None: one file). Files appear whole; OSError on a full disk.
    """
    output = host_path(output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; expected a folder: choose another")
    weights = _weights(checkpoint_dir, tag, includes_frozen=not exclude_frozen_parameters)
    max_bytes = sys.maxsize if max_shard_size is None else parse_size(max_shard_size)
    output.mkdir(parents=True, exist_ok=True)
    check_space(output, sum(tensor.num_bytes for tensor in weights.tensors.values()))
    staging = output / f".zero_to_fp32.tmp-{secrets.token_hex(8)}"
    staging.mkdir()
    try:
        if safe_serialization:
            write_model(staging, weights.tensors, max_shard_bytes=max_bytes)
        else:
            _write_pickles(staging, weights, max_bytes)
        for path in sorted(staging.iterdir(), key=lambda path: path.suffix == ".json"):  # the index last
            path.replace(output / path.name)
        sync_folder(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `zero_to_fp32 CHECKPOINT_DIR OUTPUT_DIR`; return the exit code: 1 for damage, 2 when it cannot be done."""
    asked = _parser().parse_args(argv)
    try:
        convert_zero_checkpoint_to_fp32_state_dict(
            asked.checkpoint_dir,
            asked.output_dir,
            max_shard_size=asked.max_shard_size,
            safe_serialization=asked.safe_serialization,
            tag=asked.tag,
            exclude_frozen_parameters=asked.exclude_frozen_parameters,
        )
    except (ValueError, OSError) as error:
        if asked.debug:
            raise
        logger.error(str(error))
        return 1 if isinstance(error, CheckpointDamaged) else 2
    logger.info(f"wrote {asked.output_dir}")
    return 0


def _weights(checkpoint: str | os.PathLike[str], tag: str | None, *, includes_frozen: bool) -> _Weights:
    found = consolidate(open_reader(checkpoint, tag), includes_frozen=includes_frozen)
    return _Weights({name: _in_fp32(name, tensor) for name, tensor in found.tensors.items()}, found.tied)


def _in_fp32(name: str, tensor: LazyTensor) -> LazyTensor:
    return cast(name, tensor, torch.float32) if tensor.dtype.is_floating_point else tensor


def _write_pickles(folder: Path, weights: _Weights, max_bytes: int) -> None:
    sizes = {name: tensor.num_bytes for name, tensor in weights.tensors.items()}
    shards = split(sizes, max_bytes)
    files = shard_names(PICKLE_NAME, len(shards))
    for file, names in zip(files, shards, strict=True):
        state: dict[str, Tensor] = {name: weights.tensors[name].contiguous() for name in names}
        others = {other: state[name] for other, name in weights.tied.items() if name in state}
        names += others  # they are in the index too
        torch.save(state | others, folder / file)
    if len(files) > 1:
        write_index(folder, PICKLE_NAME, files, shards, sum(sizes.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zero_to_fp32", description="Write a checkpoint's weights in fp32, as one model, without GPUs."
    )
    parser.add_argument("checkpoint_dir", help="the folder with `latest` in it, or one tag's folder")
    parser.add_argument("output_dir", help="folder for the weights; made if need be")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="most bytes a file (5GB)")
    parser.add_argument("--safe_serialization", action="store_true", help="model.safetensors, not pytorch_model.bin")
    parser.add_argument("-t", "--tag", help="a checkpoint other than the latest, such as global_step100")
    parser.add_argument("--exclude_frozen_parameters", action="store_true", help="trained weights only")
    parser.add_argument("-d", "--debug", action="store_true", help="show where an error comes from")
    return parser
