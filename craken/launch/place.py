"""Decides which hosts and slots a job gets and which of them are this host's, and checks the job before it starts."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from craken.launch.arguments import DEFAULT_HOSTFILE, LaunchOptions
from craken.launch.cores import parse_core_list, usable_cores
from craken.launch.devices import count_accelerators, may_have_accelerators
from craken.launch.env import World, read_env_files
from craken.launch.hostfile import apply_filters, limit, parse_hostfile
from craken.launch.node import NodeJob
from craken.launch.ports import check_port
from craken.launch.remote import decode_slots, node_rank_from
from craken.log import logger

_LOOPBACK = "127.0.0.1"
_LOCAL_NAMES = ("localhost", _LOOPBACK, "::1")
_DEFAULT_CPU_RANKS = 2


@dataclass(frozen=True)
class Place:
    """Where a job runs: the world, and this host's part in it unless the hosts are to be reached from here."""

    world: World
    node_rank: int = 0
    is_remote: bool = False
    restricts_devices: bool = False


def choose_place(options: LaunchOptions) -> Place:
    """Decide hosts and slots; ValueError names the flag to change."""
    if options.world_info:
        return _as_told(options)
    hosts = _read_hosts(options.hostfile)
    if hosts is not None:
        return _from_hostfile(options, hosts)
    if options.num_nodes > 1:
        return _one_of_many(options)
    if options.node_rank > 0:
        raise ValueError(f"--node_rank {options.node_rank}: give --num_nodes too, the number of hosts in the job")
    if options.force_multi:
        raise ValueError(f"--force_multi: no hosts to reach; name them in a hostfile ({options.hostfile} is not there)")
    slots, is_part = _local_slots(options)
    world = World({"localhost": slots}, options.master_addr or _LOOPBACK, options.master_port)
    return Place(world, restricts_devices=is_part)


def node_job(options: LaunchOptions, place: Place) -> NodeJob:
    """Turn options into this host's job; checks the port where rank 0 is to listen."""
    if place.node_rank == 0:
        check_port(place.world.master_port)
    if options.venv_script:
        raise ValueError("--venv_script is for other hosts; on this one activate the environment before you launch")
    head = [options.user_script]
    if not options.no_python:
        head = [sys.executable, *(["-m"] if options.module else []), *head]
    cores = parse_core_list(options.bind_core_list) if options.bind_core_list else usable_cores()
    return NodeJob(
        world=place.world,
        node_rank=place.node_rank,
        command=[*head, *options.user_args],
        num_head=None if options.no_local_rank else len(head),
        restricts_devices=place.restricts_devices,
        cores=cores if options.bind_cores_to_rank else None,
        grace_s=options.grace,
        log_folder=options.enable_each_rank_log,
        environment=read_env_files(),
    )


def check_script(options: LaunchOptions) -> None:
    """Raise ValueError when the script or program is not there."""
    if options.module:
        return
    if options.no_python:
        if shutil.which(options.user_script) is None:
            raise ValueError(f"program {options.user_script!r}: not found on PATH, or not executable; check its name")
    elif not Path(options.user_script).exists():
        raise ValueError(f"script {options.user_script!r}: no such file in {os.getcwd()}; check the path")


def check_config(arguments: Sequence[str]) -> None:
    """Raise ValueError when the script's `--deepspeed_config` names a file that is missing or wrong."""
    path = config_path(arguments)
    if path is None:
        return
    from craken.config import load_config

    try:
        load_config(path, warns=False)  # rank 0 will
    except (OSError, TypeError) as error:
        raise ValueError(f"--deepspeed_config {path}: {error}") from error


def config_path(arguments: Sequence[str]) -> str | None:
    """Return the value of the last `--deepspeed_config` (or `--deepspeed-config`) among a script's arguments."""
    found = None
    for position, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if flag not in ("--deepspeed_config", "--deepspeed-config"):
            continue
        found = value if equals else next(iter(arguments[position + 1 : position + 2]), None)
    return found


def is_this_host(name: str) -> bool:
    """Claim that `name` is a name of the host we are on."""
    return name in _LOCAL_NAMES or name in own_names()


def own_names() -> list[str]:
    """Return the names this host goes by, full and short."""
    name = socket.gethostname()
    return list(dict.fromkeys([name, name.partition(".")[0], socket.getfqdn()]))


def _as_told(options: LaunchOptions) -> Place:
    """Read this host's part from what the job's launcher sent."""
    slots = decode_slots(options.world_info)
    world = World(slots, options.master_addr, options.master_port)
    node_rank = options.node_rank
    if node_rank < 0:
        node_rank = node_rank_from(os.environ, world.hosts, own_names())
    return Place(world, node_rank, restricts_devices=may_have_accelerators())


def _from_hostfile(options: LaunchOptions, hosts: dict[str, list[int]]) -> Place:
    chosen = limit(apply_filters(hosts, options.include, options.exclude), options.num_nodes, options.num_gpus)
    is_single = len(chosen) == 1 and not options.force_multi
    master_addr = options.master_addr or (_LOOPBACK if is_single else next(iter(chosen)))
    world = World(chosen, master_addr, options.master_port)
    if is_single:
        return Place(world, restricts_devices=may_have_accelerators())
    if master_addr in _LOCAL_NAMES and len(chosen) > 1:
        raise ValueError(f"{master_addr} is another host on each host; give --master_addr, an address all can reach")
    if not (options.no_ssh or options.node_rank >= 0):
        return Place(world, is_remote=True)
    return Place(world, _checked_node_rank(options, len(chosen)), restricts_devices=may_have_accelerators())


def _one_of_many(options: LaunchOptions) -> Place:
    """Place a job whose hosts are each started by hand, all with the same number of ranks."""
    if options.node_rank < 0 and not options.no_ssh:
        raise ValueError(
            f"--num_nodes {options.num_nodes}: which hosts? Name them in a hostfile (--hostfile), "
            "or run this on each host with --node_rank=0, 1, ... and --master_addr"
        )
    node_rank = _checked_node_rank(options, options.num_nodes)
    if not options.master_addr:
        raise ValueError("--master_addr: needed with --node_rank; give the address of the host of node rank 0")
    slots, is_part = _local_slots(options)
    world = World(
        {f"node-{number}": slots for number in range(options.num_nodes)}, options.master_addr, options.master_port
    )
    return Place(world, node_rank, restricts_devices=is_part)


def _checked_node_rank(options: LaunchOptions, num_nodes: int) -> int:
    if not 0 <= options.node_rank < num_nodes:
        got = "nothing" if options.node_rank < 0 else options.node_rank
        raise ValueError(f"--node_rank: expected 0 to {num_nodes - 1}, this host's number, got {got}")
    return options.node_rank


def _read_hosts(hostfile: str) -> dict[str, list[int]] | None:
    """Read the hostfile; None when there is none (clients pass the word `None` for that)."""
    path = Path(hostfile)
    if path.is_file():
        return parse_hostfile(path.read_text(), hostfile)
    if hostfile not in (DEFAULT_HOSTFILE, "None", ""):
        raise ValueError(f"--hostfile {hostfile}: no such file; leave the flag out to run on this host alone")
    return None


def _local_slots(options: LaunchOptions) -> tuple[list[int], bool]:
    """Return this host's slots, and whether they are a part only of the accelerators that are there."""
    num_found = count_accelerators()
    if num_found == 0:
        return _cpu_slots(options), False
    if options.num_gpus > num_found:
        raise ValueError(f"--num_gpus: {options.num_gpus} asked for, {num_found} accelerators found; ask for fewer")
    slots = _filtered(list(range(num_found)), options)[: options.num_gpus if options.num_gpus > 0 else None]
    return slots, len(slots) < num_found


def _cpu_slots(options: LaunchOptions) -> list[int]:
    if options.num_gpus > 0:
        logger.info(f"no accelerator found: starting {options.num_gpus} CPU ranks")
        return list(range(options.num_gpus))
    if options.include or options.exclude:
        return _filtered(list(range(max(_DEFAULT_CPU_RANKS, len(usable_cores())))), options)
    logger.info(f"no accelerator found: starting {_DEFAULT_CPU_RANKS} CPU ranks (--num_gpus=N for another number)")
    return list(range(_DEFAULT_CPU_RANKS))


def _filtered(slots: list[int], options: LaunchOptions) -> list[int]:
    return apply_filters({"localhost": slots}, options.include, options.exclude)["localhost"]
