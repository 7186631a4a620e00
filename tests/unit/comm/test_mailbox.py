"""Letters in the job's store: read once they are there, from any thread."""

from __future__ import annotations

import threading
import time

import pytest

from craken.comm import MeshAxis, world_axis
from craken.comm.mailbox import Mailbox

ALONE = MeshAxis("dp", None, 0, 1)


def test_letters_stay_until_they_are_cleared() -> None:
    mailbox = Mailbox("test", ALONE)
    mailbox.post("a", {"x": (1, None)})
    mailbox.post("b", b"\0\xff")
    assert mailbox.read(["b", "a"], patience_s=1) == [b"\0\xff", {"x": (1, None)}]
    assert mailbox.read([], patience_s=0) == []
    mailbox.clear(["a"])
    with pytest.raises(TimeoutError, match="heard nothing of a for 0 s"):
        mailbox.read(["a", "b"], patience_s=0)


def exchange(names: list[str]) -> list[list[str]]:
    """Hold several exchanges at once, each in a thread, begun in another order on each rank."""
    axis, heard = world_axis(), {}

    def hold(name: str) -> None:
        mailbox = Mailbox(name, axis)
        time.sleep(0.02 * axis.rank)
        mailbox.post(f"{axis.rank}", f"{name} of {axis.rank}")
        heard[name] = mailbox.read([f"{rank}" for rank in range(axis.size)], patience_s=20)

    order = names if axis.rank == 0 else names[::-1]
    threads = [threading.Thread(target=hold, args=(name,)) for name in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [heard[name] for name in names]


def test_ranks_hear_each_other_whatever_order_their_threads_are_in(run_ranks) -> None:
    names = ["x", "y", "z"]
    expected = [[f"{name} of {rank}" for rank in range(2)] for name in names]
    assert run_ranks(exchange, 2, names) == [expected, expected]
