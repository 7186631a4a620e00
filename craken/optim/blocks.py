"""Cuts lists of tensors into runs of blocks that an elementwise update can take at once.

An update of several operations (multiply, add, sign, ...) over a 40 MB tensor reads and writes memory once an
operation, and needs temporaries as large as the tensor. Over blocks that stay in a core's cache it touches memory
once, and the temporaries are as small as a run of blocks. A GPU wants the opposite: few, large launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CPU_RUN_NUMEL = 1 << 16
_DEVICE_RUN_NUMEL = 1 << 24


class Run(NamedTuple):
    """Blocks to update together: `owners[i]` is the index of the tensor that block i was cut from.

    `lists[k][i]` is that part of the k-th list's tensor, a view that writes through.
    """

    owners: list[int]
    lists: list[list[Tensor]]


def runs(*lists: Sequence[Tensor]) -> Iterator[Run]:
    """Yield runs of blocks over lists that hold tensors of equal shapes at equal places; empty tensors are left out.

    A run stays on one device and in one dtype, and holds about 64 k elements on the CPU, 16 M elsewhere.
    """
    run, room, home = Run([], [[] for _ in lists]), 0, None
    for owner, tensors in enumerate(zip(*lists, strict=True)):
        for blocks in _cut(tensors):
            key = (blocks[0].device, blocks[0].dtype)
            if run.owners and (room < blocks[0].numel() or key != home):
                yield run
                run = Run([], [[] for _ in lists])
            if not run.owners:
                room, home = _run_numel(blocks[0].device), key
            room -= blocks[0].numel()
            run.owners.append(owner)
            for part, block in zip(run.lists, blocks, strict=True):
                part.append(block)
    if run.owners:
        yield run


def _run_numel(device: torch.device) -> int:
    return _CPU_RUN_NUMEL if device.type == "cpu" else _DEVICE_RUN_NUMEL


def _cut(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same cuts of every tensor; strided tensors, which have no flat view, come in one piece."""
    numel, limit = tensors[0].numel(), _run_numel(tensors[0].device)
    if numel == 0:
        return
    if numel <= limit or not all(tensor.is_contiguous() for tensor in tensors):
        yield tuple(tensors)
        return
    yield from zip(*(torch.split(tensor.view(-1), limit) for tensor in tensors), strict=True)
