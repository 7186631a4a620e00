"""Any pipeline x tensor grid loads what any other has saved, to the bit; the grids are made of specs alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from craken.checkpoint import Piece, Reader, verify
from craken.spec import ShardSpec
from tests.unit.checkpoint.ranks import Brought, numbers, save_on_ranks

NUM_LAYERS, HIDDEN, INNER = 3, 6, 10
KINDS = ("weight", "optimizer.exp_avg")


class Grid(NamedTuple):
    """Ranks count up along tensor, then pipeline, then data; ranks that differ in data alone hold the same."""

    pipeline: int
    tensor: int
    data: int = 1

    @property
    def num_ranks(self) -> int:
        return self.pipeline * self.tensor * self.data

    def __str__(self) -> str:
        return f"pp{self.pipeline}-tp{self.tensor}-dp{self.data}"


GRIDS = [Grid(2, 2), Grid(1, 1), Grid(3, 1), Grid(2, 3, 2), Grid(1, 4)]


@functools.cache
def model() -> dict[tuple[str, str], Tensor]:
    """The whole tensors, by kind and name: weights of each layer in bf16, a state of the optimizer in fp32."""
    shapes = {"embed": (31, HIDDEN), "head": (31, HIDDEN)}
    for layer in range(NUM_LAYERS):
        shapes |= {f"{layer}.up": (INNER, HIDDEN), f"{layer}.down": (HIDDEN, INNER), f"{layer}.norm": (HIDDEN,)}
    dtypes = dict(zip(KINDS, (torch.bfloat16, torch.float32), strict=True))
    return {
        (kind, name): numbers(*shape, seed=len(kind) * 100 + i).to(dtypes[kind])
        for kind in KINDS
        for i, (name, shape) in enumerate(shapes.items())
    }


def cuts(total: int, num_parts: int, part: int) -> tuple[int, int]:
    return total * part // num_parts, total * (part + 1) // num_parts


def ranges(name: str, shape: tuple[int, ...], grid: Grid, rank: int) -> Iterator[tuple[int, int]]:
    """Yield the flat ranges [low, high) that a rank keeps: rows, a part of each row, all of it, or none."""
    part, stage = rank % grid.tensor, rank // grid.tensor % grid.pipeline
    layer = {"embed": 0, "head": NUM_LAYERS - 1}.get(name) if "." not in name else int(name.split(".")[0])
    first, last = cuts(NUM_LAYERS, grid.pipeline, stage)
    if layer not in range(first, last):
        return
    if name.endswith("norm"):
        yield 0, shape[0]
    elif name.endswith("down"):
        low, high = cuts(shape[1], grid.tensor, part)
        yield from ((row * shape[1] + low, row * shape[1] + high) for row in range(shape[0]))
    else:
        low, high = cuts(shape[0], grid.tensor, part)
        yield low * shape[1], high * shape[1]


def specs(grid: Grid, rank: int) -> Iterator[tuple[str, ShardSpec, Tensor]]:
    """Yield (kind, spec, values) of all that a rank keeps."""
    for (kind, name), full in model().items():
        for low, high in ranges(name, tuple(full.shape), grid, rank):
            yield kind, ShardSpec(name, tuple(full.shape), low, high - low), full.reshape(-1)[low:high]


@pytest.mark.parametrize("saved", GRIDS, ids=str)
def test_a_grid_s_checkpoint_is_loaded_by_every_other(tmp_path: Path, saved: Grid) -> None:
    brought = [Brought([Piece(*held) for held in specs(saved, rank)]) for rank in range(saved.num_ranks)]
    assert save_on_ranks(tmp_path, "a", brought) == [tmp_path / "a"] * saved.num_ranks
    assert verify(tmp_path / "a") == []
    sizes = [path.stat().st_size for path in (tmp_path / "a").glob("rank-*")]
    assert sum(sizes) < 4096 * 4 * saved.num_ranks + sum(full.nbytes for full in model().values()), "replicas are there"
    for grid in GRIDS:
        reader = Reader(tmp_path)
        for rank in range(grid.num_ranks):
            for kind, spec, values in specs(grid, rank):
                out = torch.full_like(values, torch.nan)
                reader.read(kind, spec, out)
                assert torch.equal(out, values), f"{grid} rank {rank}: {kind} of {spec}"
