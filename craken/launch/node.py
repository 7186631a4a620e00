"""One host's share of a job: plans the command and environment of each rank there, and runs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from craken.launch import guard
from craken.launch.cores import split_cores, threads_per_rank
from craken.launch.env import World, rank_environment, visible_devices
from craken.launch.supervise import RankCommand, Supervisor


@dataclass(frozen=True)
class NodeJob:
    """What one host is to run.

    `command` is a full command line; `num_head` of its words come before the place where `--local_rank=N` goes, None
    leaves that word out. `cores` are shared out between the ranks, None binds nothing.
    """

    world: World
    command: list[str]
    node_rank: int = 0
    num_head: int | None = None
    restricts_devices: bool = False
    cores: Sequence[int] | None = None
    grace_s: float = 30.0
    log_folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_ranks(job: NodeJob, environment: Mapping[str, str]) -> list[RankCommand]:
    """Plan this host's ranks on top of `environment`, the launcher's own."""
    slots = job.world.local_slots(job.node_rank)
    shares = None if job.cores is None else split_cores(list(job.cores), len(slots))
    shared = {**environment, **job.environment}
    if shares is not None:
        shared["OMP_NUM_THREADS"] = str(len(shares[0]))
    shared.setdefault("OMP_NUM_THREADS", str(threads_per_rank(len(slots))))
    if job.restricts_devices:
        shared["CUDA_VISIBLE_DEVICES"] = visible_devices(slots, environment.get("CUDA_VISIBLE_DEVICES"))
    return [
        RankCommand(
            rank=job.world.first_rank(job.node_rank) + local_rank,
            command=guarded(_with_local_rank(job, local_rank)),
            environment={**shared, **rank_environment(job.world, job.node_rank, local_rank)},
            cores=None if shares is None else shares[local_rank],
        )
        for local_rank in range(len(slots))
    ]


def guarded(command: Sequence[str]) -> list[str]:
    """Put the guard between Python and its script, so that the last exception is filed; other programs stay as is."""
    words = [word for word in command[1:2] if word != "-u"] + list(command[2:])
    is_python = Path(command[0]).name.startswith("python") or command[0] == sys.executable
    if not is_python or not words or (words[0].startswith("-") and words[0] != "-m"):
        return list(command)
    return [command[0], guard.__file__, *words]


def supervisor(job: NodeJob, *, is_agent: bool = False) -> Supervisor:
    """Make the supervisor of this host's ranks."""
    commands = plan_ranks(job, os.environ)
    return Supervisor(commands, grace_s=job.grace_s, log_folder=job.log_folder, is_agent=is_agent)


def _with_local_rank(job: NodeJob, local_rank: int) -> list[str]:
    if job.num_head is None:
        return job.command
    return [*job.command[: job.num_head], f"--local_rank={local_rank}", *job.command[job.num_head :]]
