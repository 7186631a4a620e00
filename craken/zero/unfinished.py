"""The gradients of an unfinished accumulation, out and back in: on as many ranks, at the same stage.

What a rank holds between two micro-batches is its own: sums of its own micro-batches where gradients stay whole until
the boundary (stages 0 and 1), its shard of the sums so far where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from craken.zero.gradients import kept_as, load_state, state_of
from craken.zero.group import ShardGroup


def gradient_state(groups: Sequence[ShardGroup]) -> dict[str, Any]:
    """Return what has come since the last step as plain values and tensors on loan."""
    return {
        "accumulates": any(group.gradients.rules.accumulates for group in groups),
        "has_any": any(group.gradients.has_any for group in groups),
        "layout": _layout(groups),
        "groups": [state_of(group.gradients) for group in groups],
    }


def can_load(groups: Sequence[ShardGroup], state: dict[str, Any]) -> bool:
    """Say whether a state comes from the same rank of the same model, sharded alike; may begin to accumulate."""
    if state["accumulates"]:
        for group in groups:
            group.gradients.begin_accumulating()
    return bool(_layout(groups) == state["layout"])


def load_gradient_state(groups: Sequence[ShardGroup], state: dict[str, Any]) -> None:
    """Take back what `gradient_state` returned, on top of nothing; `can_load` must have been asked."""
    for group, saved in zip(groups, state["groups"], strict=True):
        load_state(group.gradients, saved)


def _layout(groups: Sequence[ShardGroup]) -> list[str]:
    return [kept_as(group.gradients) for group in groups]
