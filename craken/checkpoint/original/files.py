"""Reads the files that the original's `torch.save` wrote: checked, mapped into memory, running nothing they name.

A pickle can name any function and have it called. Here it may name tensors and plain values, which torch's
`weights_only` reader knows, and the few types in `_ALLOWED`, each replaced by a stand-in of ours. A file that names
anything else is refused before it is read. The tensors stay in the file until their bytes are asked for.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from craken.checkpoint.errors import CheckpointDamaged


class OriginalObject:
    """The attributes of an object whose class is not here; it has no methods."""


_ALLOWED: dict[str, Callable[..., Any]] = {
    "deepspeed.utils.tensor_fragment.fragment_address": OriginalObject,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": OriginalObject,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": OriginalObject,
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}


def read_original(path: Path) -> Any:
    """Return what a file holds, its tensors mapped from it and on the CPU.

    ValueError naming the file and the global if it names a type that is not allowed; CheckpointDamaged when it is cut
    short or its bytes do not fit its checksums.
    """
    with safe_globals([*((stand_in, name) for name, stand_in in _ALLOWED.items()), *_numpy_types()]):
        try:
            unknown = get_unsafe_globals_in_checkpoint(path)
            if not unknown:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError) as error:
            raise CheckpointDamaged(
                f"{path} cannot be read: {_first_line(error)}; it was cut short or changed"
            ) from error
    raise ValueError(
        f"{path} names {', '.join(sorted(unknown))}, which would have to be run to be read; expected tensors, plain "
        "values and numpy arrays only: take it out of the client state and save again with the original"
    )


def check_bytes(path: Path) -> None:
    """Read all of a file and compare with the checksums in it; CheckpointDamaged naming the file and the record."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointDamaged(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointDamaged(f"{path} is damaged: its record {damaged} does not fit its checksum")


def _numpy_types() -> list[Any]:
    """Return what numpy's pickles of arrays and scalars of plain types name, under its old and its new module names."""
    makers = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    makers_by_name = [(maker, f"{module}.{name}") for name, maker in makers.items() for module in modules]
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"}  # objects and records: refused
    return [*makers_by_name, np.ndarray, np.dtype, *dtypes]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
