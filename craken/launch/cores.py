"""Which CPU cores there are, and which of them each rank gets: pure arithmetic over core numbers."""

from __future__ import annotations

import os
from pathlib import Path


def parse_core_list(text: str) -> list[int]:
    """Turn `0,2-4,7` into [0, 2, 3, 4, 7]; ValueError on anything else, on repeats and on descending ranges."""
    cores: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"--bind_core_list: expected numbers and ranges such as 0,2-4, got {part!r} in {text!r}")
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"--bind_core_list: the range {part!r} runs backwards; write {high}-{low}")
        cores.extend(range(low, high + 1))
    if len(set(cores)) != len(cores):
        raise ValueError(f"--bind_core_list: {text!r} names a core twice; each core may appear once")
    return cores


def split_cores(cores: list[int], num_ranks: int) -> list[list[int]]:
    """Cut `cores` into `num_ranks` runs of equal length; the remainder goes unused so that all ranks are alike."""
    share = len(cores) // num_ranks
    if share == 0:
        raise ValueError(
            f"cannot bind {num_ranks} ranks to {len(cores)} cores, one core a rank is the least; "
            "start fewer ranks, name more cores in --bind_core_list or drop --bind_cores_to_rank"
        )
    return [cores[rank * share : (rank + 1) * share] for rank in range(num_ranks)]


def usable_cores() -> list[int]:
    """Return the core numbers that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_per_rank(num_ranks: int) -> int:
    """Return the threads that each of `num_ranks` ranks can run at once on this host, at least 1."""
    num_cores = min(len(usable_cores()), _quota_cores(Path("/sys/fs/cgroup/cpu.max")))
    return max(1, num_cores // num_ranks)


def _quota_cores(file: Path) -> int:
    """Return the cores a container's CPU quota is worth (`quota period` in us), or a large number when unlimited."""
    try:
        quota, period = file.read_text().split()
    except (OSError, ValueError):
        return 1 << 20
    return 1 << 20 if quota == "max" else max(1, int(quota) // int(period))
