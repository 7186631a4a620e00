"""A profile of a step shows the engine's phases by name."""

from __future__ import annotations

import torch
from torch import nn
from torch.profiler import profile


def profiled_names() -> set[str]:
    import craken

    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}
    engine, *_ = craken.initialize(model=nn.Linear(16, 16), config=config)
    with profile() as seen:
        engine.backward(engine(torch.ones(1, 16)).sum())
        engine.step()
    engine.destroy()
    return {event.key for event in seen.key_averages() if event.key.startswith("craken::")}


def test_a_profile_names_the_phases(run_ranks) -> None:
    for names in run_ranks(profiled_names, 2):
        assert {"craken::engine::forward", "craken::engine::backward", "craken::engine::step"} <= names
        assert {"craken::zero::reduce (weight)", "craken::zero::refresh (weight)", "craken::zero::step"} <= names
