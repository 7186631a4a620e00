"""Writes a checkpoint's weights as a Hugging Face model, whatever the topology that saved it, a range at a time.

    checkpoint --consolidate--> names as in the module --take adapter apart, lay over --base--> base weights
               --add the adapter--> --quantise or cast--> OUT/model*.safetensors, config.json, tokenizer

Until something is written nothing but headers and indexes has been read. Each arrow makes lazy tensors of lazy
tensors; writing pulls 32 MiB at a time through all of them. The folder appears whole or not at all.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from craken.checkpoint import folder as folders
from craken.checkpoint.consolidated import Consolidated, consolidate, open_reader
from craken.checkpoint.export import adapter as adapters
from craken.checkpoint.export import model_files
from craken.checkpoint.export.quantise import Form, config_section, quantise, without_unfit
from craken.checkpoint.export.weight_files import Written, parse_size, read_model, write_model
from craken.checkpoint.lazy import LazyTensor, cast
from craken.checkpoint.place import Place
from craken.spec import BUFFER, FROZEN

_TIES = "tie_word_embeddings"


# answers for the folder of a config.json: the linear layers to quantise, and those to be left (output, tied, Conv1D)
LinearLayers = Callable[[Path], tuple[Sequence[str], Sequence[str]]]


@dataclass(frozen=True)
class Changes:
    """What an export changes on the way; quantising (`form`) needs `linear_layers`."""

    dtype: torch.dtype | None = None  # None: as stored
    adapter: Path | None = None  # a folder that PEFT wrote, to be merged
    base: Path | None = None  # the base model's folder, for weights that the checkpoint was saved without
    form: Form | None = None
    linear_layers: LinearLayers | None = None


@dataclass(frozen=True)
class Planned:
    """What will be written: the tensors, the dtype to tell, and what config.json says differently."""

    source: Place
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype
    model_files: Path | None
    config_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def plan_export(
    checkpoint: str | os.PathLike[str], changes: Changes, *, tag: str | None = None, files: Path | None = None
) -> Planned:
    """Work out what an export writes, without reading a weight.

    `files` is the folder of config.json and tokenizer (None: looked for near the checkpoint). ValueError naming what
    does not fit: an adapter of another kind, a layer without weights, a quantised base without its scales.
    """
    found = consolidate(open_reader(checkpoint, tag))
    source = model_files.find(found.path, files, [changes.base] if changes.base else [])
    tensors, tied = _base_weights(found, changes.base), found.tied
    _check_readable(tensors, found)
    tensors, tied = _with_adapter(tensors, tied, changes, found.path)
    config = model_files.read_config(source) if source else {}
    config_changes: dict[str, Any] = {}
    if any(other in tensors for other in tied):
        config_changes[_TIES] = False  # the adapter gave two tied weights different values
    elif config.get(_TIES) is False:
        tensors |= {other: tensors[name] for other, name in tied.items()}
    dtype = changes.dtype or _usual_dtype(tensors)
    kept = {adapters.unwrapped_name(name) for name, kind in found.kinds.items() if kind == BUFFER}
    layers: Sequence[str] = ()
    if changes.form is not None:
        if source is None or changes.linear_layers is None:
            raise ValueError("quantising needs the model's config.json, to know its linear layers: give --model-files")
        layers, skipped = without_unfit(*changes.linear_layers(source), tensors, changes.form)
        tensors = quantise(tensors, layers, changes.form, dtype)
        config_changes["quantization_config"] = config_section(changes.form, skipped, dtype)
    if changes.dtype is not None:
        kept |= set(tensors) - _castable(tensors, layers)
        tensors = {name: t if name in kept else cast(name, t, changes.dtype) for name, t in tensors.items()}
    return Planned(found.path, tensors, dtype, source, config_changes)


def write_export(
    planned: Planned,
    out: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """Write what was planned to the folder `out`, which appears whole or not at all; returns what lies in it.

    ValueError when `out` holds something already; OSError when the disk is, or becomes, too full; CheckpointDamaged
    when a block that is read fails its check.
    """
    out, max_shard_bytes = Path(out).expanduser(), parse_size(max_shard_size)
    check_target(out)
    staging = folders.stage_folder(out.absolute().parent, out.absolute().name)
    try:
        check_space(staging.path, planned.num_bytes)
        written = write_model(staging.path, planned.tensors, max_shard_bytes=max_shard_bytes, on_bytes=on_bytes)
        if planned.model_files is not None:
            names = model_files.pass_on(planned.model_files, staging.path, planned.config_changes, planned.dtype)
            written = written._replace(files=[*written.files, *names])
        folders.publish(staging)
    finally:
        folders.discard(staging)
    return written


def check_target(out: Path) -> None:
    """ValueError unless `out` is new or an empty folder: an export deletes nothing."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise ValueError(f"{out} {what}; expected a new or an empty folder: remove it or choose another")


def check_space(folder: Path, num_bytes: int) -> None:
    """OSError, before anything is written, when `num_bytes` do not fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{num_bytes / 1e9:.2f} GB are to be written and {free / 1e9:.2f} GB are free: make room, choose another "
            "disk, or export as bf16",
            str(folder),
        )


def _base_weights(found: Consolidated, base: Path | None) -> dict[str, LazyTensor]:
    """Return the checkpoint's tensors, laid over those of the base model where one is given."""
    if base is None:
        return dict(found.tensors)
    below = read_model(base)
    own = {adapters.unwrapped_name(name): name for name in found.tensors}
    usable = {plain: name for plain, name in own.items() if not _is_better_in(below, plain, name, found)}
    absent = {name: tensor for name, tensor in below.items() if name not in usable}
    aliases = {adapters.unwrapped_name(other) for other in found.tied}
    return {name: t for name, t in absent.items() if name not in aliases} | {
        name: found.tensors[name] for name in usable.values()
    }


def _is_better_in(below: Mapping[str, LazyTensor], plain: str, name: str, found: Consolidated) -> bool:
    """Whether the base model's tensor replaces a frozen one that was saved packed, in whatever dtype it is kept."""
    if found.kinds[name] != FROZEN or plain not in below:
        return False
    return _is_packed(found.tensors[name]) or found.tensors[name].shape != below[plain].shape


def _with_adapter(
    tensors: dict[str, LazyTensor], tied: Mapping[str, str], changes: Changes, checkpoint: Place
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Merge the adapter in a folder, or the one that the checkpoint holds, with the settings in that folder."""
    folder = changes.adapter
    tied = {adapters.unwrapped_name(other): adapters.unwrapped_name(name) for other, name in tied.items()}
    is_wrapped = adapters.is_wrapped(tensors)
    if folder is None:
        if is_wrapped:
            places = (checkpoint, checkpoint.parent) if isinstance(checkpoint, Path) else ()
            near = [path for path in places if (path / adapters.CONFIG_NAME).is_file()]
            where = str(near[0]) if near else f"FOLDER, where its {adapters.CONFIG_NAME} lies"
            raise ValueError(
                f"{checkpoint} holds a model with a LoRA adapter around its layers; merge it: --merge-adapter {where}"
            )
        return tensors, tied
    config = adapters.read_config(folder)
    if is_wrapped:
        tensors, adapter = adapters.unwrap(tensors)
    else:
        adapters.check_initialisation(config)
        adapter = adapters.read_adapter(folder)
    for module in adapter.factors:
        name = f"{module}.weight"
        if name in tied and name not in tensors and tied[name] in tensors:
            tensors[name] = tensors[tied[name]]  # one of two tied weights is adapted: they part
    # what is cast or quantised later is rounded once
    dtype = torch.float32 if changes.form or changes.dtype else None
    return adapters.merge(tensors, adapter, config, dtype), tied


def _check_readable(tensors: Mapping[str, LazyTensor], found: Consolidated) -> None:
    for name, tensor in tensors.items():
        if _is_packed(tensor) and found.kinds.get(name, FROZEN) == FROZEN:
            raise ValueError(
                f"{name} was saved quantised ({tensor.dtype} {list(tensor.shape)}), and a checkpoint has no scales for "
                "it: give the base model's folder with --base"
            )


def _is_packed(tensor: LazyTensor) -> bool:
    return tensor.dtype in (torch.uint8, torch.int8)


def _usual_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """Return the floating-point dtype that most elements have; fp32 where there are none."""
    counts: Counter[torch.dtype] = Counter({torch.float32: 0})
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0]


def _castable(tensors: Mapping[str, LazyTensor], quantised: Sequence[str]) -> set[str]:
    """Return the names of floating-point weights that are no scales of quantised ones."""
    beside = tuple(f"{layer}." for layer in quantised)
    scales = {name for name in tensors if name.startswith(beside) and not name.endswith(".bias")} if beside else set()
    return {name for name, tensor in tensors.items() if tensor.dtype.is_floating_point} - scales
