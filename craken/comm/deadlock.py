"""Judges from what all ranks wait for whether they wait for each other for good, and puts it into words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Waiting(NamedTuple):
    """What a rank tells of the call it waits for; ranks are the job's. `beat` says that it is told anew.

    Of messages alone: the one that is missing, to or from `peer`. Of the backend's own collectives alone: what the
    last ones over the group were, this one the `at`-th and last, for the backend pairs them by their order.
    """

    what: str
    call: str
    members: list[int]
    rank: int
    number: int
    beat: int
    peer: int = -1
    group: str = ""
    tag: int = 0
    num_bytes: int = 0
    is_sent: bool = False
    at: int = 0
    past: Sequence[str] = ()


def is_deadlock(waits: Sequence[Waiting]) -> bool:
    """Say whether ranks that all wait can never go on: no call is waited for by every rank that takes part in it."""
    calls = {wait.rank: wait.call for wait in waits}
    return not any(all(calls.get(rank) == wait.call for rank in wait.members) for wait in waits)


def explain(waits: Sequence[Waiting]) -> str:
    """Word a deadlock: which ranks wait for what, and what to do."""
    apart = parting(waits)
    before = f"; they went apart before that: {_words(apart)}" if apart and apart != list(waits) else ""
    return (
        f"the ranks wait for each other: {_words(waits)}{before}. Expected the same calls on every rank "
        "(save_checkpoint and GatheredParameters too), and the same modules in the same order, whatever its data. "
        "Where a module chooses among its children by the data (experts, branches), have its weights gathered as one: "
        "set_z3_leaf_modules(model, [its class]) before initialize, or zero_optimization.leaf_module in the config"
    )


def parting(waits: Sequence[Waiting]) -> list[Waiting]:
    """Return the ranks' first calls that were not the same, if all wait on one group and remember them."""
    pasts = [dict(zip(range(wait.at - len(wait.past) + 1, wait.at + 1), wait.past, strict=True)) for wait in waits]
    remembered = set(pasts[0]).intersection(*pasts[1:])
    first = min((at for at in remembered if len({past[at] for past in pasts}) > 1), default=None)
    if first is None or len({wait.group for wait in waits}) > 1:
        return []
    return [wait._replace(what=past[first]) for wait, past in zip(waits, pasts, strict=True)]


def _words(waits: Sequence[Waiting]) -> str:
    waiters: dict[str, list[str]] = {}
    for wait in waits:
        waiters.setdefault(wait.what if wait.what.startswith(("the ", "a ")) else f"the {wait.what}", []).append(
            str(wait.rank)
        )
    return "; ".join(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} for {what}" for what, ranks in waiters.items())
