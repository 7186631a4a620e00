"""The launcher's flags: one parser for `deepspeed` and `craken launch`, one frozen record of what was asked."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_HOSTFILE = "/job/hostfile"
DEFAULT_PORT = 29500
LAUNCHERS = ("ssh", "pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich")
_LEVELS = ("debug", "info", "warning", "error", "critical")


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line asked for; -1, "" and None mean "not given". Field names are the flags'."""

    user_script: str
    user_args: list[str]
    hostfile: str
    include: str
    exclude: str
    num_nodes: int
    min_elastic_nodes: int
    max_elastic_nodes: int
    num_gpus: int
    master_port: int
    master_addr: str
    node_rank: int
    launcher: str
    launcher_args: str
    module: bool
    no_python: bool
    no_local_rank: bool
    no_ssh: bool
    no_ssh_check: bool
    force_multi: bool
    save_pid: bool
    enable_each_rank_log: Path | None
    autotuning: str
    elastic_training: bool
    max_restarts: int
    bind_cores_to_rank: bool
    bind_core_list: str
    ssh_port: int | None
    venv_script: str
    grace: float
    log_level: str
    world_info: str
    agent: bool


def parse(argv: Sequence[str], prog: str) -> LaunchOptions:
    """Parse a command line; argparse exits with code 2 and a usage line on unknown flags. ValueError on bad pairs."""
    options = LaunchOptions(**vars(build_parser(prog).parse_args(_joined(argv))))
    check(options)
    return options


def _joined(argv: Sequence[str]) -> list[str]:
    """Write `--launcher_args "-i key"` as one word: argparse would take a value that begins with a dash for a flag."""
    words = list(argv)
    if "--launcher_args" in words[:-1]:
        position = words.index("--launcher_args")
        words[position : position + 2] = ["=".join(words[position : position + 2])]
    return words


def check(options: LaunchOptions) -> None:
    """Raise ValueError on values and combinations that cannot work, NotImplementedError on documented gaps."""
    if options.autotuning:
        raise NotImplementedError(
            "--autotuning is not available yet; measure candidates with a short run each (`craken train --steps 20`)"
        )
    if options.module and options.no_python:
        raise ValueError("--module and --no_python exclude each other: a module needs Python to run it")
    filtered = options.include or options.exclude
    if filtered and (options.num_nodes > 0 or options.num_gpus > 0):
        raise ValueError("--include/--exclude and --num_nodes/--num_gpus exclude each other; the filters say it all")
    for flag in ("num_nodes", "num_gpus", "min_elastic_nodes", "max_elastic_nodes"):
        if getattr(options, flag) == 0 or getattr(options, flag) < -1:
            raise ValueError(f"--{flag}: expected at least 1, got {getattr(options, flag)}")
    if options.node_rank < -1:
        raise ValueError(f"--node_rank: expected 0 or more, got {options.node_rank}")
    if options.grace < 0:
        raise ValueError(f"--grace: expected seconds, 0 or more, got {options.grace:g}")
    if not options.elastic_training and (options.min_elastic_nodes > 0 or options.max_elastic_nodes > 0):
        raise ValueError("--min_elastic_nodes/--max_elastic_nodes have an effect with --elastic_training only; add it")
    if options.bind_core_list and not options.bind_cores_to_rank:
        raise ValueError("--bind_core_list has an effect with --bind_cores_to_rank only; add it")
    if options.launcher == "mvapich":
        raise NotImplementedError("--launcher mvapich: mpirun_rsh is not supported; use --launcher mpich or ssh")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser; a flag's help says what it does and what happens without it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [flags] script.py [script arguments]",
        allow_abbrev=False,
        description="Start a training script as one rank an accelerator, on this host or on many.",
        epilog="Ctrl-C is passed on so that ranks can save; a second one stops them at once.",
    )
    _add_where(parser)
    _add_rendezvous(parser)
    _add_what(parser)
    _add_supervision(parser)
    parser.add_argument("user_script", help="script, or module with --module, or program with --no_python")
    parser.add_argument("user_args", nargs=argparse.REMAINDER, help="passed on to it")
    return parser


def _add_where(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where to run")
    add = group.add_argument
    add(
        *("-H", "--hostfile"),
        default=DEFAULT_HOSTFILE,
        help=f"lines `host slots=N` ({DEFAULT_HOSTFILE} if it exists, else this host alone)",
    )
    add("-i", "--include", default="", metavar="HOST[:SLOT,...][@...]", help="use these hosts and slots only")
    add("-e", "--exclude", default="", metavar="HOST[:SLOT,...][@...]", help="use all but these")
    add("--num_nodes", type=int, default=-1, help="use the first N hosts")
    add(
        *("--num_gpus", "--num_accelerators"),
        type=int,
        default=-1,
        help="ranks on each host; without accelerators these are CPU ranks (default: all found, else 2)",
    )
    add("--bind_cores_to_rank", action="store_true", help="give each rank CPU cores of its own")
    add("--bind_core_list", default="", metavar="0,2-4", help="the cores to share out (default: all)")


def _add_rendezvous(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("more than one host")
    add = group.add_argument
    add("--master_addr", default="", help="address of the host of rank 0 (default: the first host)")
    add("--master_port", type=int, default=DEFAULT_PORT, help=f"port on it where ranks meet ({DEFAULT_PORT})")
    add("--node_rank", type=int, default=-1, help="number of this host, when you start each host yourself")
    add("--no_ssh", action="store_true", help="you start this command on each host yourself, with --node_rank")
    add("--launcher", default="", type=str.lower, choices=LAUNCHERS, help="what reaches the hosts (ssh)")
    add("--launcher_args", default="", help="more words for that program, in one quoted string")
    add("--force_multi", action="store_true", help="go through the launcher even for one host")
    add("--ssh_port", type=int, default=None, help="port of sshd on the hosts")
    add("--no_ssh_check", action="store_true", help="accepted; nothing is checked ahead, failures are reported")
    add("--venv_script", default="", help="activation script to source on each host; its python is used")
    add("--elastic_training", action="store_true", help="restart with the hosts that are left (torch's elastic agent)")
    add("--min_elastic_nodes", type=int, default=-1, help="fewest hosts to go on with (1)")
    add("--max_elastic_nodes", type=int, default=-1, help="most hosts (those of the job)")
    add("--max_restarts", type=int, default=100, help="with --elastic_training: give up after so many restarts (100)")
    add("--world_info", default="", help=argparse.SUPPRESS)  # set by the launcher for the hosts' own launchers
    add("--agent", action="store_true", help=argparse.SUPPRESS)


def _add_what(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to run")
    add = group.add_argument
    add("--module", action="store_true", help="the script is a module, as for `python -m`")
    add("--no_python", action="store_true", help="the script is a program of its own")
    add("--no_local_rank", action="store_true", help="do not add --local_rank=N to the script's arguments")
    add("--autotuning", default="", choices=("tune", "run"), help="not available yet")


def _add_supervision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("while it runs")
    add = group.add_argument
    add("--grace", type=float, default=30.0, metavar="S", help="seconds to save after Ctrl-C or SIGTERM (30)")
    add("--enable_each_rank_log", type=_log_folder, default=None, metavar="DIR", help="copy output to a log a rank")
    add("--save_pid", action="store_true", help="write the launcher's process id to /tmp/<id>.ds while it runs")
    add("--log_level", default="info", choices=_LEVELS, help="of the launcher (info)")
    add("-q", "--quiet", action="store_const", const="error", dest="log_level", help="the same as --log_level error")


def _log_folder(text: str) -> Path | None:
    return None if text in ("", "None") else Path(text)
