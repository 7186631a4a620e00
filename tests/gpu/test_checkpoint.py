"""On CUDA: what the host saved loads onto the device and back, and saves in the background are of one moment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import craken
from craken.checkpoint import Piece, Reader, save
from craken.comm import init_distributed, shutdown, world_axis
from craken.spec import ShardSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device on this machine"),
]


@pytest.fixture(autouse=True)
def alone():
    init_distributed()
    yield
    shutdown()


@pytest.mark.parametrize("numel", [1000, 5_000_001])
@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_what_one_device_saves_another_loads(tmp_path: Path, source: str, target: str, numel: int) -> None:
    values, spec = torch.randn(numel, device=source), ShardSpec("w", (numel,), 0, numel)
    save(tmp_path, "tag", pieces=[Piece("weight", spec, values)], axis=world_axis(), rank_state={}, shared_state={})
    out = torch.empty(numel, device=target)
    Reader(tmp_path).read("weight", spec, out)
    assert torch.equal(out.cpu(), values.cpu())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_save_in_the_background_is_of_the_moment_it_began(tmp_path: Path, stage: int) -> None:
    def start() -> craken.DeepSpeedEngine:
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "zero_optimization": {"stage": stage},
            "checkpoint": {"async_save": True},
        }
        return craken.initialize(model=nn.Linear(1024, 1024), config=config)[0]

    def step(engine: craken.DeepSpeedEngine) -> float:
        loss = engine(torch.ones(1, 1024, device="cuda")).square().mean()
        engine.backward(loss)
        engine.step()
        return loss.item()

    engine = start()
    step(engine)
    engine.save_checkpoint(tmp_path)
    expected = [step(engine) for _ in range(3)]  # while it is written
    engine.wait_for_checkpoint()
    engine.destroy()
    engine = start()
    engine.load_checkpoint(tmp_path)
    assert [step(engine) for _ in range(3)] == expected
    engine.destroy()
