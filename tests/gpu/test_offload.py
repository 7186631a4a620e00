"""On CUDA: the host updates what the device has summed; copies, streams and page-locked memory are real."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.case import Case
from tests.parity.model import batch, tiny_gpt
from tests.parity.plain import weights_of
from tests.parity.test_offload import COMBINATIONS, offload_sections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


ROUNDING = 1 << 20  # bytes: small tensors


def train(case: Case, stage: int, states: str, weights: str, folder: str) -> Any:
    """Return the losses and the weights at the end."""
    import craken

    config = case.config(stage)
    config["zero_optimization"] |= offload_sections(states, weights, folder)
    model = tiny_gpt(case.traits)
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    losses = []
    for step in range(6):
        for micro in range(case.accumulation):
            loss = engine(batch(step, micro, 0))
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
    weights = {name: weight.cpu() for name, weight in weights_of(model).items()}
    engine.destroy()
    return losses, weights


def train_beside(case: Case, stage: int, states: str, weights: str, folder: str) -> Any:
    return train(case, stage, "none", "none", folder), train(case, stage, states, weights, folder)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "states", "weights"), COMBINATIONS)
def test_offload_trains_alike(run_ranks, tmp_path: Path, stage, states, weights, dtype, accumulation) -> None:
    case = Case(dtype, 1, accumulation, clip=0.5, device="cuda")
    ((plain, offloaded),) = run_ranks(train_beside, 1, case, stage, states, weights, str(tmp_path), joins_world=False)
    # the host's Adam and the device's round differently: fused multiply-adds
    assert offloaded[0] == pytest.approx(plain[0], rel=1e-5 if dtype == "fp32" else 5e-3)
    for name, weight in plain[1].items():
        torch.testing.assert_close(offloaded[1][name], weight, rtol=1e-4, atol=1e-4 if dtype == "fp32" else 1e-2)


def peak(states: str, weights: str, frozen: bool) -> tuple[int, int, dict[str, int]]:
    """Return the device's peak in the third step, its peak before that, and the ledger."""
    import craken

    gc.collect()  # the engine before this one
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048), nn.ReLU()) for _ in range(24)))
    if frozen:
        for block in model[:-1]:
            block.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 5_000_000,
            "offload_optimizer": {"device": states},
            "offload_param": {"device": weights},
        },
    }
    torch.cuda.reset_peak_memory_stats()
    engine, *_ = craken.initialize(model=model, config=config)
    for step in range(3):
        if step == 2:
            torch.cuda.synchronize()
            before = torch.cuda.max_memory_allocated() - start
            torch.cuda.reset_peak_memory_stats()
        x = torch.ones(8, 2048, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - start, before, engine.memory_ledger()
    engine.destroy()
    return found


def peaks(frozen: bool) -> list[tuple[int, int, dict[str, int]]]:
    peak("none", "none", frozen)  # the libraries' workspaces
    return [peak(*where, frozen) for where in (("none", "none"), ("cpu", "none"), ("none", "cpu"), ("cpu", "cpu"))]


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "one block of 24 trained"])
def test_offload_never_raises_the_peak_of_the_device(run_ranks, frozen) -> None:
    (found,) = run_ranks(peaks, 1, frozen, joins_world=False)
    (plain, plain_before, _), (states, *_), (weights, weights_before, ledger), (both, both_before, _) = found
    assert max(states, weights) <= plain + ROUNDING, found
    assert both <= min(states, weights) + ROUNDING, found
    assert max(weights_before, both_before) <= plain_before + ROUNDING, found
    numel = 24 * (2048 * 2048 + 2048)
    assert plain - both > 2 * numel * (0.7 if frozen else 5), f"{found}: what left the device is not free there"
    if frozen:  # the large frozen part rests on the host, the small trained one has its states on the device
        assert ledger["host"] > 0.9 * 2 * numel, found
        assert 0 < ledger["device"] < 0.1 * 14 * numel, found


def states_come_back() -> list[tuple[int, int, int]]:
    import craken

    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }
    engine, *_ = craken.initialize(model=model, config=config)
    found = []
    for step in range(3):
        held = torch.cuda.memory_allocated()
        if step:
            engine.offload_states()
            away = torch.cuda.memory_allocated()
            engine.reload_states()
            found.append((held, away, torch.cuda.memory_allocated()))
        engine.backward(engine(torch.ones(4, 1024, dtype=torch.bfloat16, device="cuda")).float().square().mean())
        engine.step()
    engine.destroy()
    return found


def test_states_leave_the_device_and_return(run_ranks) -> None:
    (found,) = run_ranks(states_come_back, 1, joins_world=False)
    numel = 8 * (1024 * 1024 + 1024)
    for held, away, back in found:
        assert held - away > 0.95 * 14 * numel, found
        assert back == held - 2 * numel, f"{found}: all but the last step's gradients are back"
