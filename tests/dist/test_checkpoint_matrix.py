"""Every topology's checkpoint continues under every other: the same losses, the same states to the bit.

Each checkpoint is made once and resumed by many. Losses agree to the bit on the same topology and to 1e-6 between fp32
runs. Where bf16 computes on either side its 8 bits of mantissa decide: 2e-3 on the losses, which lie around 3 and are
means over 192 tokens. Master weights and moments come over to the bit whichever dtype computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from craken.checkpoint import Reader, reader, saver, shard_file
from craken.checkpoint.blocks import begin_block
from tests.dist.topologies import DISK, HOST, Topology, start, train

STEPS_BEFORE, STEPS_AFTER = 3, 2
TOLERANCE_FP32, TOLERANCE_BF16 = 1e-6, 2e-3

PLAIN = [
    *(Topology(stage, ranks) for stage in range(4) for ranks in (1, 2, 4)),
    *(Topology(stage, ranks, "bf16") for stage, ranks in ((0, 4), (1, 2), (2, 1), (3, 4))),
]
OFFLOADED = [
    Topology(1, 2, "bf16", HOST),
    Topology(2, 4, "fp32", HOST),
    Topology(2, 2, "bf16", DISK),
    Topology(3, 2, "fp32", HOST),
    Topology(3, 4, "bf16", "none", HOST),
    Topology(3, 1, "bf16", HOST, HOST),
    Topology(3, 2, "fp32", DISK, DISK),
]
SAVED = [*PLAIN, *OFFLOADED, Topology(3, 8)]
RESUMED = [
    Topology(0, 2),
    Topology(2, 3),
    Topology(3, 1),
    Topology(3, 4, "fp32", HOST, HOST),
    Topology(1, 2, "bf16"),
    Topology(3, 3, "bf16", DISK),
]


def save_and_go_on(folder: str, topologies: list[Topology], swap: str) -> list[list[list[float]]]:
    """For each topology: save, and return the losses afterwards, uninterrupted and resumed."""
    found = []
    for topology in topologies:
        engine = start(topology, swap)
        train(engine, STEPS_BEFORE)
        engine.save_checkpoint(folder, tag=str(topology))
        losses = [train(engine, STEPS_AFTER)]
        engine.destroy()
        engine = start(topology, swap, nudge=1.0)
        engine.load_checkpoint(folder, tag=str(topology))
        losses.append(train(engine, STEPS_AFTER))
        engine.destroy()
        found.append(losses)
    return found


class Saved(NamedTuple):
    """Where the checkpoints lie, each under its topology's name, and the losses that follow: uninterrupted, resumed."""

    folder: Path
    losses: dict[Topology, list[list[float]]]


@pytest.fixture(scope="module")
def saved(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    folder, swap = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("swap")
    losses = {}
    for world_size in sorted({topology.world_size for topology in SAVED}):
        topologies = [topology for topology in SAVED if topology.world_size == world_size]
        by_rank = run_ranks(save_and_go_on, world_size, str(folder), topologies, str(swap))
        losses.update(zip(topologies, by_rank[0], strict=True))
    yield Saved(folder, losses)


@pytest.mark.parametrize("topology", SAVED, ids=str)
def test_the_same_topology_continues_to_the_bit(saved: Saved, topology: Topology) -> None:
    uninterrupted, resumed = saved.losses[topology]
    assert all(map(math.isfinite, uninterrupted))
    assert resumed == uninterrupted


def resume_each(folder: str, mine: Topology, tags: dict[str, bool], again: str, swap: str) -> list[list[float]]:
    """Load one checkpoint after another into one engine, save it anew if so told; return the losses that follow."""
    engine, found = start(mine, swap, nudge=1.0), []
    for tag, saves in tags.items():
        engine.load_checkpoint(folder, tag=tag)
        assert engine.global_steps == STEPS_BEFORE
        if saves:
            engine.save_checkpoint(again, tag=tag)
        found.append(train(engine, STEPS_AFTER))
    engine.destroy()
    return found


@pytest.mark.parametrize("mine", RESUMED, ids=str)
def test_every_checkpoint_continues_on_another_topology(run_ranks, tmp_path, saved: Saved, mine: Topology) -> None:
    number = RESUMED.index(mine)  # each checkpoint is saved anew by one of them
    tags = {str(topology): i % len(RESUMED) == number for i, topology in enumerate(SAVED)}
    args = str(saved.folder), mine, tags, str(tmp_path / "again"), str(tmp_path)
    for topology, losses in zip(SAVED, run_ranks(resume_each, mine.world_size, *args)[0], strict=True):
        is_fp32 = mine.dtype == topology.dtype == "fp32"
        expected = saved.losses[topology][0]
        assert losses == pytest.approx(expected, rel=TOLERANCE_FP32 if is_fp32 else TOLERANCE_BF16), topology
        if tags[str(topology)]:
            assert_same_states(Reader(saved.folder, str(topology)), Reader(tmp_path / "again", str(topology)))


def assert_same_states(one: Reader, other: Reader) -> None:
    """All weights and optimizer states of `one` are in `other` to the bit; frozen weights as far as its dtype goes."""
    assert sorted(other.kinds()) == sorted(one.kinds())
    for kind in one.kinds():
        assert sorted(other.names(kind)) == sorted(one.names(kind))
        for name in one.names(kind):
            ours, theirs = one.read_full(kind, name), other.read_full(kind, name)
            assert torch.equal(ours.to(theirs.dtype), theirs), (one.tag, kind, name)
    assert other.shared_state["optimizer"] == one.shared_state["optimizer"]


WIDTH, NUM_LAYERS = 64, 8
SMALL_BLOCK_BYTES = 256


def stack(width: int, num_layers: int) -> Any:
    """Return an engine at stage 3 that has taken a step."""
    import craken

    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))
    zero = {"stage": 3, "reduce_bucket_size": width * width, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
    }
    engine, *_ = craken.initialize(model=model, config=config)
    engine.backward(engine(torch.ones(1, width)).square().mean())
    engine.step()
    return engine


def save_stack(folder: str, width: int, num_layers: int, block_bytes: int) -> None:
    with mock.patch.object(saver, "BLOCK_BYTES", block_bytes), mock.patch.object(shard_file, "BLOCK_BYTES", block_bytes):
        engine = stack(width, num_layers)
        engine.save_checkpoint(folder)
        engine.destroy()


def read_stack(folder: str, width: int, num_layers: int) -> int:
    """Load and return the bytes of tensors that this rank took from files."""
    counted: list[int] = []

    def count(*args: Any) -> Any:
        counted.append(args[2].num_bytes)
        return begin_block(*args)

    engine = stack(width, num_layers)
    with mock.patch.object(reader, "begin_block", count):
        engine.load_checkpoint(folder)
    engine.destroy()
    return sum(counted)


@pytest.mark.parametrize(("saved_by", "read_by"), [(4, 3), (2, 4), (1, 4)])
def test_a_rank_reads_its_share_of_the_files_and_no_more(run_ranks, tmp_path, saved_by: int, read_by: int) -> None:
    run_ranks(save_stack, saved_by, str(tmp_path), WIDTH, NUM_LAYERS, SMALL_BLOCK_BYTES)
    tensor_bytes = 3 * 4 * NUM_LAYERS * (WIDTH * WIDTH + WIDTH)
    for num_bytes in run_ranks(read_stack, read_by, str(tmp_path), WIDTH, NUM_LAYERS):
        # less: the last shard of a group is shorter; more: blocks cut at either end, states of one rank and of all
        assert 0.9 * tensor_bytes / read_by < num_bytes < 1.1 * tensor_bytes / read_by + 12_000


def peak_of_loading(folder: str, width: int, num_layers: int) -> int:
    """Return by how many bytes memory rose, while a checkpoint was loaded, over what was held before and after."""
    engine = stack(width, num_layers)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    engine.load_checkpoint(folder)
    peak = resident_bytes("VmHWM") - max(before, resident_bytes("VmRSS"))
    engine.destroy()
    return peak


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def test_loading_holds_little_more_than_what_it_loads(run_ranks, tmp_path) -> None:
    width, num_layers = 1448, 12  # 8 MiB a layer, 144 MiB of states a rank
    run_ranks(save_stack, 1, str(tmp_path), width, num_layers, 16 << 20)
    peaks = run_ranks(peak_of_loading, 2, str(tmp_path), width, num_layers)
    layer = 4 * width * width
    assert max(peaks) < 4 * layer + layer  # a layer for each reading thread, and a group on its way
