"""One host's ranks."""

from __future__ import annotations

import sys

from craken.launch.env import World
from craken.launch.guard import __file__ as guard_path
from craken.launch.node import NodeJob, guarded, plan_ranks

WORLD = World({"a": [0, 1], "b": [2, 3]}, "a", 29500)


def test_a_hosts_ranks_are_planned_from_its_slots() -> None:
    job = NodeJob(
        WORLD, [sys.executable, "t.py", "x"], node_rank=1, num_head=2, restricts_devices=True, cores=[4, 5, 6, 7]
    )
    first, second = plan_ranks(job, {"PATH": "/bin", "OMP_NUM_THREADS": "9"})
    assert (first.rank, second.rank) == (2, 3)
    assert second.command == [sys.executable, guard_path, "t.py", "--local_rank=1", "x"]
    assert second.environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert (second.cores, second.environment["OMP_NUM_THREADS"]) == ([6, 7], "2")
    assert second.environment["PATH"] == "/bin"


def test_the_users_thread_count_stays() -> None:
    (rank, *_) = plan_ranks(NodeJob(WORLD, ["x"]), {"OMP_NUM_THREADS": "9"})
    assert rank.environment["OMP_NUM_THREADS"] == "9"
    assert "CUDA_VISIBLE_DEVICES" not in rank.environment


def test_only_python_scripts_and_modules_are_guarded() -> None:
    assert guarded([sys.executable, "-u", "t.py"]) == [sys.executable, guard_path, "t.py"]
    assert guarded(["python3", "-m", "pkg", "x"]) == ["python3", guard_path, "-m", "pkg", "x"]
    assert guarded([sys.executable, "-c", "pass"]) == [sys.executable, "-c", "pass"]
    assert guarded(["/bin/true"]) == ["/bin/true"]
    assert guarded([sys.executable]) == [sys.executable]
