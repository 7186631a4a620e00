"""`--elastic_training`: one host's share of a job that restarts with the hosts that are left, on torch's elastic agent.

The agents meet at the master's port (rendezvous backend c10d); when a rank or a host dies, all ranks are stopped and
started again with a new world, until `max_restarts`. Ranks must resume from their last checkpoint themselves.
"""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from craken.launch.failure import Failure, first_cause, read_filed, report, shell_code, signal_name
from craken.launch.guard import ERROR_FOLDER
from craken.launch.node import NodeJob, plan_ranks
from craken.launch.orders import obey_stdin
from craken.launch.supervise import Order
from craken.log import logger

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig

_MONITOR_INTERVAL_S = 0.1
_RENDEZVOUS_TIMEOUT_S = 600
_LAST_CALL_S = 10  # how long hosts that are enough wait for more
_LOCAL_RANK = "${local_rank}"  # the agent puts the number in its place


def run_elastic(job: NodeJob, *, min_nodes: int, max_nodes: int, max_restarts: int, is_agent: bool = False) -> int:
    """Run this host's ranks under torch's elastic agent; return the job's exit code. Imports torch."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    if not 1 <= min_nodes <= max_nodes:
        raise ValueError(f"--min_elastic_nodes {min_nodes} to --max_elastic_nodes {max_nodes} holds no number of hosts")
    if is_agent:
        obey_stdin(_signal_self)
    with tempfile.TemporaryDirectory(prefix="craken_launch_") as folder:
        words = _prepare(job, folder)
        config = _config(job, min_nodes=min_nodes, max_nodes=max_nodes, max_restarts=max_restarts)
        try:
            elastic_launch(config, words[0])(*words[1:])
        except ChildFailedError as error:
            failures = _failures(error, Path(folder))
            logger.error(report(failures))
            return first_cause(failures).code
        except SignalException as stop:
            return 128 + stop.sigval
        except RendezvousError as error:
            logger.error(
                f"hosts did not meet at {config.rdzv_endpoint}: {error}; is the launcher of the first running?"
            )
            return 1
    return 0


def _prepare(job: NodeJob, folder: str) -> list[str]:
    """Set this process's environment, which the agent hands to ranks, and return their command line."""
    planned = plan_ranks(job, os.environ)[0]
    kept = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", *job.environment)
    os.environ.update({key: planned.environment[key] for key in kept if key in planned.environment})
    os.environ[ERROR_FOLDER] = folder
    # A store of its own for each attempt: in the agent's, gloo finds the addresses of the attempt before (torch 2.13)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return [f"--local_rank={_LOCAL_RANK}" if word == "--local_rank=0" else word for word in planned.command]


def _config(job: NodeJob, *, min_nodes: int, max_nodes: int, max_restarts: int) -> LaunchConfig:
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        nproc_per_node=len(job.world.local_slots(job.node_rank)),
        run_id=os.environ.get("ELASTIC_RUN_ID", "craken"),
        rdzv_backend="c10d",
        rdzv_endpoint=f"{job.world.master_addr}:{job.world.master_port}",
        rdzv_configs={
            "is_host": job.node_rank == 0,
            "join_timeout": _RENDEZVOUS_TIMEOUT_S,
            "last_call_timeout": _LAST_CALL_S,
        },
        max_restarts=max_restarts,
        monitor_interval=_MONITOR_INTERVAL_S,
        local_addr=job.world.master_addr if job.node_rank == 0 else None,
    )


def _failures(error: ChildFailedError, folder: Path) -> list[Failure]:
    """Join what the agent saw with what ranks filed: the agent alone names a victim when the first rank was killed."""
    filed = read_filed(folder)
    known = {failure.pid for failure in filed}
    start = max((failure.time_s for failure in filed), default=0.0)
    codes = {rank: (seen.pid, shell_code(seen.exitcode)) for rank, seen in error.failures.items()}
    seen = [
        Failure(rank, pid, code, start, kind=signal_name(code))
        for rank, (pid, code) in codes.items()
        if pid not in known and code != 128 + signal.SIGTERM  # the agent's own doing
    ]
    return filed + seen or [Failure(rank, pid, code, start) for rank, (pid, code) in codes.items()]


def _signal_self(order: Order) -> None:
    os.kill(os.getpid(), signal.SIGINT if order is Order.INTERRUPT else signal.SIGTERM)
