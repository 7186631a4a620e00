"""From a command line to ranks: reads hosts and files, checks what can be checked ahead, hands over to a runner."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from craken.launch.arguments import LaunchOptions, parse
from craken.launch.elastic import run_elastic
from craken.launch.env import World, exported_environment, read_env_files
from craken.launch.guard import die_with_parent
from craken.launch.hosts import HostDriver
from craken.launch.local import run_job
from craken.launch.node import NodeJob, supervisor
from craken.launch.orders import obey_stdin, send_failures
from craken.launch.place import Place, check_config, check_script, choose_place, is_this_host, node_job
from craken.launch.remote import (
    carrier_command,
    carrier_environment,
    local_command,
    node_words,
    pdsh_node_rank,
    shell_line,
    ssh_command,
)
from craken.launch.supervise import RankCommand, Supervisor
from craken.log import logger

_NODE_MARKER = "-98765"  # stands in a shell line where pdsh is to put the host's number
_PROGRAMS = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpiexec", "impi": "mpirun", "slurm": "srun", "ssh": "ssh"}


def main(argv: Sequence[str] | None = None, prog: str = "deepspeed") -> int:
    """Run the launcher on a command line; return the exit code, 2 when nothing was started because of the input."""
    try:
        return launch(parse(sys.argv[1:] if argv is None else argv, prog))
    except (ValueError, NotImplementedError) as error:
        logger.error(str(error))
        return 2


def launch(options: LaunchOptions) -> int:
    """Start what `options` ask for and wait for its end; ValueError before the first rank on anything that is wrong."""
    logger.setLevel(options.log_level.upper())
    place = choose_place(options)
    if options.world_info:
        die_with_parent()  # sshd, pdsh, mpirun or slurmstepd: without it nobody could stop this host's ranks
    else:
        check_script(options)
        check_config(options.user_args)
    with _pid_file(options.save_pid):
        if place.is_remote:
            return _launch_remotely(options, place.world)
        return _launch_here(options, place)


def _launch_here(options: LaunchOptions, place: Place) -> int:
    job = node_job(options, place)
    if options.elastic_training:
        num_nodes = len(place.world.hosts)
        return run_elastic(
            job,
            min_nodes=max(1, options.min_elastic_nodes),
            max_nodes=options.max_elastic_nodes if options.max_elastic_nodes > 0 else num_nodes,
            max_restarts=options.max_restarts,
            is_agent=options.agent,
        )
    return _run_as_agent(job) if options.agent else run_job(job)


def _run_as_agent(job: NodeJob) -> int:
    ranks = supervisor(job, is_agent=True)
    obey_stdin(ranks.give)
    outcome = ranks.run()
    send_failures(sorted(outcome.failures, key=lambda failure: (failure.is_victim, failure.time_s)))
    return outcome.code


def _launch_remotely(options: LaunchOptions, world: World) -> int:
    launcher = options.launcher or "ssh"
    program = _PROGRAMS[launcher]
    if shutil.which(program) is None:
        others = [name for name, program in _PROGRAMS.items() if shutil.which(program)]
        raise ValueError(
            f"--launcher {launcher} needs `{program}`, which is not on PATH; install it, or use --launcher "
            f"{' or '.join(others) or 'ssh (package openssh-client)'}"
        )
    if launcher == "ssh":
        return _launch_by_ssh(options, world)
    is_pdsh = launcher == "pdsh"
    line = _line(options, world, int(_NODE_MARKER) if is_pdsh else -1, is_agent=False)
    command = carrier_command(launcher, world.hosts, pdsh_node_rank(line, _NODE_MARKER) if is_pdsh else line, options)
    environment = {**os.environ, **carrier_environment(launcher, options)}
    outcome = Supervisor([RankCommand(0, command, environment)], grace_s=options.grace, is_carrier=True).run()
    if outcome.code:
        logger.error(f"{program} ended with code {outcome.code}; the host that failed says why above")
    return outcome.code


def _launch_by_ssh(options: LaunchOptions, world: World) -> int:
    commands = {}
    for node_rank, host in enumerate(world.hosts):
        line = _line(options, world, node_rank, is_agent=True)
        commands[host] = local_command(line) if is_this_host(host) else ssh_command(host, line, options)
    min_hosts = max(1, options.min_elastic_nodes) if options.elastic_training else None
    return HostDriver(commands, grace_s=options.grace, min_hosts=min_hosts).run()


def _line(options: LaunchOptions, world: World, node_rank: int, *, is_agent: bool) -> str:
    return shell_line(
        node_words(options, world, node_rank, is_agent=is_agent),
        folder=os.getcwd(),
        environment={**exported_environment(os.environ), **read_env_files()},
        venv_script=options.venv_script,
    )


@contextlib.contextmanager
def _pid_file(is_wanted: bool) -> Iterator[None]:
    """Keep `<temp>/<pid>.ds` with the launcher's process id while the job runs."""
    if not is_wanted:
        yield
        return
    path = Path(tempfile.gettempdir()) / f"{os.getpid()}.ds"
    path.unlink(missing_ok=True)
    with path.open("x") as file:
        file.write(str(os.getpid()))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
