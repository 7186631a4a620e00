"""Saving and resuming through the engine: the losses after it are those of the run that was never interrupted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

STEPS, SAVED_AT = 6, 3
OFFLOADS = ("offload_optimizer", "offload_param")


class Model(nn.Module):
    """Dropout draws from the generator, one layer is frozen, a buffer counts forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("num_forwards", torch.zeros(()))
        self.frozen.requires_grad_(False)
        self.dropout = 0.2

    def forward(self, x: Tensor) -> Tensor:
        self.num_forwards += 1
        return self.last(F.dropout(self.frozen(self.first(x)).relu(), self.dropout, self.training))


def start(stage: int, precision: str, seed: int, swap_folder: str = "", **sections: Any) -> Any:
    import craken

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(40, 8, generator=generator), torch.randint(0, 3, (40,), generator=generator))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100,
            "stage3_param_persistence_threshold": 20,
            **({name: {"device": "nvme", "nvme_path": swap_folder} for name in OFFLOADS} if swap_folder else {}),
        },
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "auto_cast": True, "initial_scale_power": 8},
        **sections,
    }
    return craken.initialize(model=Model(), training_data=data, config=config)


def whole_state(engine: Any) -> dict[str, Tensor]:
    from craken.zero import GatheredParameters

    with GatheredParameters(engine.module.parameters()):
        return {name: value.clone() for name, value in engine.module.state_dict().items()}


def train(engine: Any, batches: Any, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps * 2):
        x, y = next(batches)
        loss = F.cross_entropy(engine(x.to(engine.first.weight.dtype)).float(), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def uninterrupted_and_resumed(folder: str, stage: int, precision: str, swap_folder: str = "") -> None:
    from craken.engine import RepeatingLoader

    engine, _, loader, scheduler = start(stage, precision, dist.get_rank(), swap_folder)
    batches = iter(RepeatingLoader(loader))
    train(engine, batches, SAVED_AT)
    assert engine.save_checkpoint(folder, client_state={"note": ("a", 1)})
    expected = train(engine, batches, STEPS - SAVED_AT)
    expected_lr = scheduler.get_last_lr()
    weights = whole_state(engine)
    engine.destroy()

    torch.manual_seed(1234 + dist.get_rank())
    random.seed(dist.get_rank())
    engine, _, loader, scheduler = start(stage, precision, 99, swap_folder)
    path, client = engine.load_checkpoint(folder)
    assert path == str(Path(folder) / f"global_step{SAVED_AT}")
    assert client == {"note": ("a", 1)}
    assert (engine.global_steps, engine.micro_steps) == (SAVED_AT, 2 * SAVED_AT)
    assert train(engine, iter(RepeatingLoader(loader)), STEPS - SAVED_AT) == expected
    assert scheduler.get_last_lr() == expected_lr
    for name, value in whole_state(engine).items():
        assert torch.equal(value, weights[name]), name
    engine.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resuming_continues_the_curve_to_the_bit(run_ranks, tmp_path, stage, precision) -> None:
    run_ranks(uninterrupted_and_resumed, 2, str(tmp_path), stage, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_states_in_files_are_saved_and_resumed_to_the_bit(run_ranks, tmp_path, precision) -> None:
    run_ranks(uninterrupted_and_resumed, 2, str(tmp_path / "saved"), 3, precision, str(tmp_path / "swap"))


def save_under(folder: str, stage: int) -> list[float]:
    engine, _, loader, _ = start(stage, "fp32", seed=0)
    train(engine, iter(loader), 2)
    engine.save_checkpoint(folder, tag="here")
    engine.module.eval()
    values = engine.module(torch.ones(1, 8)).flatten().tolist()
    engine.destroy()
    return values


def load_under(folder: str, stage: int) -> list[float]:
    engine, *_ = start(stage, "fp32", seed=7)
    engine.load_checkpoint(folder, tag="here")
    engine.module.eval()
    values = engine.module(torch.ones(1, 8)).flatten().tolist()
    engine.destroy()
    return values


@pytest.mark.parametrize(("saved", "loaded"), [((0, 2), (2, 4)), ((2, 4), (3, 2)), ((3, 4), (0, 1)), ((3, 2), (3, 4))])
def test_another_stage_on_another_number_of_ranks_reads_the_same_weights(run_ranks, tmp_path, saved, loaded) -> None:
    stage, world_size = saved
    first = run_ranks(save_under, world_size, str(tmp_path), stage)
    stage, world_size = loaded
    second = run_ranks(load_under, world_size, str(tmp_path), stage)
    assert second == [first[0]] * world_size


def losses_of_steps(engine: Any, batches: Any, num_steps: int) -> list[float]:
    """Take steps without dropout; return the mean loss of each over all samples of all ranks."""
    losses = []
    engine.module.dropout = 0.0
    for _ in range(num_steps):
        total = torch.zeros(())
        for _ in range(engine.gradient_accumulation_steps()):
            x, y = next(batches)
            loss = F.cross_entropy(engine(x), y)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps() / dist.get_world_size()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def save_in_an_epoch(folder: str) -> list[float]:
    engine, _, loader, _ = start(2, "fp32", seed=0, gradient_accumulation_steps=1)
    batches = iter(loader)
    losses_of_steps(engine, batches, 2)
    engine.save_checkpoint(folder)
    losses = losses_of_steps(engine, batches, 2)  # of the 5 steps of an epoch
    engine.destroy()
    return losses


def go_on_elsewhere(folder: str, stage: int, micro_batch: int, accumulation: int) -> tuple[list[float], int]:
    sizes = {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation}
    engine, _, loader, _ = start(stage, "fp32", seed=99, **sizes)
    with mock.patch("craken.engine.loading.warn_once") as warn:
        engine.load_checkpoint(folder)
    losses = losses_of_steps(engine, iter(loader), 2)
    engine.destroy()
    return losses, warn.call_count


@pytest.fixture
def saved_by_four(run_ranks, tmp_path) -> tuple[str, list[float]]:
    return str(tmp_path), run_ranks(save_in_an_epoch, 4, str(tmp_path))[0]


@pytest.mark.parametrize(
    ("world_size", "stage", "micro_batch", "accumulation"), [(4, 2, 1, 2), (2, 2, 2, 2), (2, 3, 4, 1), (1, 0, 2, 4)]
)
def test_another_split_of_a_step_continues_the_curve_within_an_epoch(
    run_ranks, saved_by_four, world_size, stage, micro_batch, accumulation
) -> None:
    folder, expected = saved_by_four
    for losses, num_warnings in run_ranks(go_on_elsewhere, world_size, folder, stage, micro_batch, accumulation):
        assert losses == pytest.approx(expected, abs=1e-6)
        assert num_warnings == 0


def test_a_step_of_another_size_is_told(run_ranks, saved_by_four) -> None:
    folder, expected = saved_by_four
    for losses, num_warnings in run_ranks(go_on_elsewhere, 2, folder, 2, 2, 1):
        assert num_warnings == 1
        assert losses != pytest.approx(expected, abs=1e-3)


def wrong_loads(folder: str) -> list[str]:
    engine, *_ = start(2, "fp32", seed=0)
    assert engine.load_checkpoint(folder) == (None, None)
    engine.save_checkpoint(folder)
    messages = []
    with pytest.raises(OSError, match="failed on 2 of 2 ranks: rank 0, 1: CheckpointNotFound") as caught:
        engine.load_checkpoint(folder, tag="global_step77")
    messages.append(str(caught.value))
    engine.destroy()
    import craken

    other, *_ = craken.initialize(
        model=nn.Linear(3, 3),
        config={"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 1e-3}}},
    )
    with pytest.raises(ValueError, match="does not fit") as wrong:
        other.load_checkpoint(folder)
    messages.append(str(wrong.value))
    other.destroy()
    return messages


def test_what_cannot_be_loaded_is_named(run_ranks, tmp_path) -> None:
    missing, misfit = run_ranks(wrong_loads, 2, str(tmp_path))[0]
    assert "global_step77" in missing
    assert "global_step0" in missing
    assert "does not fit this model: it lacks bias, weight; it has besides first.bias" in misfit


def numbered(folder: str) -> None:
    engine, _, loader, _ = start(1, "fp32", seed=0)
    train(engine, iter(loader), 1)
    for tag in (5, 0):
        assert engine.save_checkpoint(folder, tag=tag)
    path, _ = engine.load_checkpoint(folder, tag=5)
    assert path == str(Path(folder) / "5")
    engine.destroy()


def test_a_tag_may_be_a_number_zero_included(run_ranks, tmp_path) -> None:
    run_ranks(numbered, 2, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "0\n"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "5"]
