"""Control traffic between the ranks of an axis: objects, barriers, short vectors."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from craken.comm import events, messages
from craken.comm.mesh import MeshAxis
from craken.comm.watchdog import Started, watched


def gather_objects(obj: Any, axis: MeshAxis) -> list[Any]:
    """Collective over `axis`: return every rank's `obj`, in rank order, on all ranks."""
    if axis.size == 1:
        return [obj]
    if axis.backend == "gloo":
        return messages.objects(obj, axis)
    gathered: list[Any] = [None] * axis.size
    watched("objects", axis, dist.all_gather_object, gathered, obj)
    return gathered


def broadcast_object(obj: Any, axis: MeshAxis, source: int = 0) -> Any:
    """Collective over `axis`: return the `obj` of the axis's rank `source` on all ranks."""
    if axis.size == 1:
        return obj
    if axis.backend == "gloo":
        return messages.objects(obj if axis.rank == source else None, axis)[source]
    box = [obj if axis.rank == source else None]
    watched("objects", axis, dist.broadcast_object_list, box, src=axis.global_rank(source))
    return box[0]


def barrier(axis: MeshAxis) -> None:
    """Collective over `axis`: return once every rank has come here."""
    if axis.size == 1:
        return
    if axis.backend == "gloo":
        messages.meet(axis)
    else:
        watched("a barrier", axis, dist.barrier)


def broadcast(tensor: Tensor, axis: MeshAxis, *, label: str, source: int = 0) -> None:
    """Collective over `axis`: overwrite `tensor` with that of the axis's rank `source`."""
    if axis.size > 1:
        sent = tensor.numel() if axis.rank == source else 0
        events.record("broadcast", label, tensor.numel(), sent, tensor.dtype, axis.name)
        collective = functools.partial(dist.broadcast, src=axis.global_rank(source))
        Started(f"broadcast of {label}", axis, collective, tensor).wait()


def all_reduce_sum(tensor: Tensor, axis: MeshAxis, *, label: str) -> Tensor:
    """Collective over `axis`: return the sum of a short vector over ranks, the same to the bit on all of them.

    The vector may lie on any device, and so will the sum.
    """
    if axis.size == 1:
        return tensor
    if axis.backend == "gloo":
        events.record("all_reduce", label, tensor.numel(), tensor.numel() * (axis.size - 1), tensor.dtype, axis.name)
        return messages.sums(tensor, axis)
    sent = 2 * tensor.numel() * (axis.size - 1) // axis.size
    events.record("all_reduce", label, tensor.numel(), sent, tensor.dtype, axis.name)
    # NCCL sends from the device alone
    device = torch.device("cuda", torch.cuda.current_device()) if axis.backend == "nccl" else tensor.device
    total = tensor.to(device, copy=True)
    Started(f"sum of {label}", axis, dist.all_reduce, total).wait()
    return total.to(tensor.device)
