"""The size limits of stage 3: what is whole at one time, gathered ahead, kept for reuse, kept for good."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.side_by_side import Pair
from tests.parity.test_stage3 import tower

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000}


def train(limits: dict[str, Any], num_steps: int = 3) -> tuple[int, list[str], int]:
    """Return the most elements that had memory at once, the gathers of the last step, and those of a block."""
    from craken.comm import event_log

    pair = Pair(3, tower(), config={"zero_optimization": {**ZERO, **limits}})
    groups = [group for group in pair.engine.groups if group.weights is not None]
    most = 0

    def note(*_: Any) -> None:
        nonlocal most
        now = sum(group.layout.padded_numel for group in groups if group.weights.num_bytes)
        most = max(most, now)

    for block in pair.model.blocks:
        block.up.register_forward_hook(note)
        block.register_full_backward_hook(note)
    for step in range(num_steps):
        with event_log() as events:
            pair.step_both(step)
    pair.assert_same_weights(atol=1e-5)
    block_numel = sum(p.ds_numel for p in pair.model.blocks[0].parameters())
    pair.close()
    return most, [event.label for event in events if event.op == "all_gather"], block_numel


def test_what_is_gathered_ahead_counts_as_live(run_ranks) -> None:
    (most, _, block), _ = run_ranks(train, 2, {})
    assert most > block, "nothing was gathered ahead"
    (most, _, _), _ = run_ranks(train, 2, {"stage3_prefetch_bucket_size": 0})
    assert most <= 1.02 * block
    (most, _, _), _ = run_ranks(train, 2, {"stage3_max_live_parameters": int(1.5 * block)})
    assert most <= 1.5 * block, "a block and one ahead are more than the ceiling"


def test_weights_used_again_soon_stay_if_the_user_says_how_soon(run_ranks) -> None:
    (_, plain, block), _ = run_ranks(train, 2, {})
    (_, turn, _), _ = run_ranks(train, 2, {"stage3_max_reuse_distance": 0})
    (most, near, _), _ = run_ranks(train, 2, {"stage3_max_reuse_distance": 4 * block})
    (whole, all_stay, _), _ = run_ranks(train, 2, {"stage3_max_reuse_distance": 10**9})
    assert len(turn) <= len(plain)
    assert len(near) < len(plain)
    assert most < whole
    assert len(all_stay) == len(plain) // 2, "backward gathered what forward had"
    ceiling = {"stage3_max_reuse_distance": 10**9, "stage3_max_live_parameters": 3 * block}
    (most, _, _), _ = run_ranks(train, 2, ceiling)
    assert most <= 3 * block


def persistent(limits: dict[str, Any]) -> int:
    pair = Pair(3, tower(), config={"zero_optimization": {**ZERO, **limits}})
    pair.step_both(0)
    whole = sum(param.numel() for param in pair.model.parameters())
    pair.close()
    return whole


@pytest.mark.parametrize(
    ("limits", "whole"),
    [
        ({}, 0),
        ({"stage3_param_persistence_threshold": 64}, 24 * 64 + 5),  # the biases
        ({"stage3_param_persistence_threshold": 64, "stage3_model_persistence_threshold": 200}, 3 * 64 + 5),
    ],
    ids=["none", "biases", "three biases"],
)
def test_small_parameters_stay_whole_up_to_a_total(run_ranks, limits, whole) -> None:
    assert run_ranks(persistent, 2, limits) == [whole, whole]
