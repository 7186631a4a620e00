"""Starts the ranks of a job on this host alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from craken.launch.cores import usable_cores
from craken.launch.env import World
from craken.launch.failure import report
from craken.launch.node import NodeJob, supervisor
from craken.launch.ports import check_port, find_free_port
from craken.log import logger

LOOPBACK = "127.0.0.1"


def launch_local(
    command: list[str],
    num_ranks: int,
    *,
    master_addr: str = LOOPBACK,
    master_port: int | None = None,
    bind_cores: bool = False,
    grace_s: float = 30.0,
    log_folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `command` as ranks 0 to `num_ranks` - 1 on this host; return the job's exit code.

    0 when all ranks end with 0, else the code of the rank that failed first (128 + number for a signal), whose
    traceback is logged once. SIGINT and SIGTERM are passed on, with `grace_s` seconds to save. `environment` is added
    to this process's own; `master_port` None takes a free one. ValueError when the port is taken or nothing can start.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: expected at least 1, got {num_ranks}")
    port = find_free_port() if master_port is None else master_port
    check_port(port)
    job = NodeJob(
        world=World({"localhost": range(num_ranks)}, master_addr, port),
        command=command,
        cores=usable_cores() if bind_cores else None,
        grace_s=grace_s,
        log_folder=log_folder,
        environment=environment or {},
    )
    return run_job(job)


def run_job(job: NodeJob) -> int:
    """Run this host's share of a job, log what failed first, return the exit code."""
    outcome = supervisor(job).run()
    if outcome.failures:
        logger.error(report(outcome.failures, outcome.finished_ranks))
    return outcome.code
