"""Letters that ranks leave for each other in the job's store: no collective, so any thread may, in any order."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from craken.comm.mesh import MeshAxis

_LOOK_S = 0.02  # how often letters that are waited for are looked for


class Mailbox:
    """One exchange among the ranks of an axis, under a name that no other exchange of the job has.

    It outlives the process group, as long as the process that serves the store does.
    """

    def __init__(self, name: str, axis: MeshAxis) -> None:
        """Connect to the job's store; RuntimeError where a process group was made without one (MPI)."""
        self._store: Any = torch._C._distributed_c10d.PrefixStore(f"craken/mail/{name}", _store_of(axis))

    def post(self, key: str, obj: Any) -> None:
        """Leave `obj` under `key` for everybody to read; RuntimeError when the store is gone."""
        self._store.set(key, pickle.dumps(obj))

    def read(self, keys: Sequence[str], *, patience_s: float) -> list[Any]:
        """Return what was left under `keys`, once all of it is there; the letters stay.

        TimeoutError naming what is missing after `patience_s`; RuntimeError when the store is gone.
        """
        deadline = time.monotonic() + patience_s
        while keys and not self._store.check(list(keys)):
            if time.monotonic() > deadline:
                missing = [key for key in keys if not self._store.check([key])]
                raise TimeoutError(f"heard nothing of {', '.join(missing)} for {patience_s:g} s")
            time.sleep(_LOOK_S)
        return [pickle.loads(self._store.get(key)) for key in keys]

    def clear(self, keys: Sequence[str]) -> None:
        """Take letters out of the store once nobody will read them; where it cannot forget, they stay."""
        with contextlib.suppress(RuntimeError):
            for key in keys:
                self._store.delete_key(key)


def _store_of(axis: MeshAxis) -> Any:
    if axis.size == 1:
        return torch._C._distributed_c10d.HashStore()
    store = dist.distributed_c10d._get_default_store()
    if store is None:
        raise RuntimeError("this process group has no store: bring it up with init_distributed(), on gloo or nccl")
    return store
