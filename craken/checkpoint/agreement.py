"""Fail on all ranks or none: run a piece of work on every rank and agree on how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from craken.comm import MeshAxis, gather_objects

Mine = TypeVar("Mine")
Told = TypeVar("Told")


class Failure(NamedTuple):
    """What went wrong on a rank, in a form that can travel."""

    kind: str
    reason: str


def run_on_all(work: Callable[[], tuple[Mine, Told]], axis: MeshAxis, *, doing: str) -> tuple[Mine, list[Told]]:
    """Collective over `axis`: run `work` on every rank; return its first result and all ranks' second ones.

    When it fails on any rank, every rank raises, naming those ranks and their reasons: ValueError if an input was
    wrong, OSError if only the file system refused, else RuntimeError.
    """
    try:
        mine, told = work()
    except Exception as error:
        outcomes = gather_objects(failure_of(error), axis)
        raise combined(outcomes, doing) from error
    outcomes = gather_objects(told, axis)
    if any(isinstance(outcome, Failure) for outcome in outcomes):
        raise combined(outcomes, doing)
    return mine, outcomes


def do_on_all(work: Callable[[], object], axis: MeshAxis, *, doing: str) -> None:
    """Collective over `axis`: run `work` on every rank; raises as `run_on_all` does."""

    def done() -> tuple[None, None]:
        work()
        return None, None

    run_on_all(done, axis, doing=doing)


def failure_of(error: BaseException) -> Failure:
    """Return what other ranks are to know of an exception on this one."""
    kind = "input" if isinstance(error, ValueError) else "system" if isinstance(error, OSError) else "other"
    return Failure(kind, f"{type(error).__name__}: {error}")


def combined(outcomes: Sequence[object], doing: str) -> Exception:
    """Return the one exception for what all ranks told, in rank order, of which some are failures."""
    failures = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, Failure)}
    ranks_of: dict[str, list[int]] = {}
    for rank, failure in failures.items():
        ranks_of.setdefault(failure.reason, []).append(rank)
    reasons = "; ".join(f"rank {', '.join(map(str, ranks))}: {reason}" for reason, ranks in ranks_of.items())
    kinds = {failure.kind for failure in failures.values()}
    kind = ValueError if "input" in kinds else OSError if kinds == {"system"} else RuntimeError
    return kind(f"{doing} failed on {len(failures)} of {len(outcomes)} ranks: {reasons}")
