"""All ranks or none."""

from __future__ import annotations

from typing import Any

import pytest

from craken.checkpoint.agreement import run_on_all
from craken.comm import MeshAxis
from tests.unit.checkpoint.ranks import ONE_RANK, gathering_threads, run_ranks_as_threads


def outcomes(*errors: Exception | None) -> list[Any]:
    """Run on one rank an item; a rank given an exception raises it."""

    def on_rank(rank: int) -> Any:
        def work() -> tuple[str, int]:
            if errors[rank] is not None:
                raise errors[rank]
            return f"own {rank}", rank * 10

        return run_on_all(work, MeshAxis("dp", None, rank, len(errors)), doing="testing")

    return run_ranks_as_threads(on_rank, len(errors))


def test_each_rank_keeps_its_own_result_and_hears_of_the_others() -> None:
    assert outcomes(None, None, None) == [(f"own {rank}", [0, 10, 20]) for rank in range(3)]


@pytest.mark.parametrize(
    ("errors", "kind", "message"),
    [
        ((None, OSError("full")), OSError, "testing failed on 1 of 2 ranks: rank 1: OSError: full"),
        ((OSError("full"), OSError("full")), OSError, "testing failed on 2 of 2 ranks: rank 0, 1: OSError: full"),
        ((ValueError("bad"), OSError("full")), ValueError, "rank 0: ValueError: bad; rank 1: OSError: full"),
        ((None, MemoryError("none left")), RuntimeError, "rank 1: MemoryError: none left"),
        ((KeyError("k"), OSError("full")), RuntimeError, "rank 0: KeyError: 'k'; rank 1: OSError: full"),
    ],
)
def test_a_failure_anywhere_is_the_same_error_everywhere(
    errors: tuple[Any, ...], kind: type[Exception], message: str
) -> None:
    raised = outcomes(*errors)
    assert [type(error) for error in raised] == [kind] * len(errors)
    assert len({str(error) for error in raised}) == 1
    assert message in str(raised[0])


def test_the_failing_rank_keeps_the_cause() -> None:
    cause = OSError("full")
    healthy, failing = outcomes(None, cause)
    assert healthy.__cause__ is None
    assert failing.__cause__ is cause


def test_one_rank_alone_needs_no_others() -> None:
    with gathering_threads(1):
        assert run_on_all(lambda: (1, 2), ONE_RANK, doing="testing") == (1, [2])
