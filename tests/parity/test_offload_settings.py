"""Settings that only say how states move, or how many are updated at a time, change no bit of what is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.test_offload import masters, offload_sections, start, step


def learnt(stage: int, sections: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
    """Return the masters after three steps, and how often the optimizer was called in the last."""
    engine, _ = start(stage, sections)
    calls = 0

    def count(*unused: Any) -> None:
        nonlocal calls
        calls += 1

    for number in range(3):
        if number == 2:
            engine.optimizer.optimizer.register_step_post_hook(count)
        step(engine, number)
    found = masters(engine)
    engine.destroy()
    return found, calls


def beside(stage: int, sections: dict[str, Any], others: dict[str, Any]) -> tuple[int, int]:
    plain, calls = learnt(stage, sections)
    changed, calls_then = learnt(stage, others)
    assert all(torch.equal(one, other) for one, other in zip(plain, changed, strict=True))
    return calls, calls_then


@pytest.mark.parametrize(
    "settings",
    [
        {"pipeline_read": False},
        {"pipeline_write": False},
        {"pipeline_read": False, "pipeline_write": False},
        {"pin_memory": False},
        {"pin_memory": True, "buffer_count": 3},
    ],
    ids=str,
)
def test_how_states_move_changes_nothing(run_ranks, tmp_path: Path, settings) -> None:
    sections = offload_sections("nvme", "nvme", str(tmp_path))
    weights = {key: value for key, value in settings.items() if not key.startswith("pipeline")}
    changed = {
        "offload_optimizer": sections["offload_optimizer"] | settings,
        "offload_param": sections["offload_param"] | weights,
    }
    run_ranks(beside, 2, 3, sections, changed)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_small_sub_group_size_updates_fewer_groups_at_a_time(run_ranks, stage) -> None:
    small = {"reduce_bucket_size": 300, "allgather_bucket_size": 300}
    for calls, calls_then in run_ranks(beside, 2, stage, small, {**small, "sub_group_size": 1}):
        assert calls_then > calls
