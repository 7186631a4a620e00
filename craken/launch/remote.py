"""Words the command lines that start one launcher on each host, whatever carries them there; pure functions.

Every carrier runs the same shell line once a host, and that line is again `craken launch`, which then starts, binds and
watches the ranks of its host. So ssh, pdsh, MPI and Slurm differ in the words below and in nothing else; MPI starts no
ranks itself, and needs no MPI in the training script.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from craken.launch.arguments import LaunchOptions
from craken.launch.env import World

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PDSH_FAN_OUT = 1024
_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_NODEID")


def encode_slots(slots: Mapping[str, Sequence[int]]) -> str:
    """Pack {host: slots} into one shell-safe word."""
    return base64.urlsafe_b64encode(json.dumps({h: list(s) for h, s in slots.items()}).encode()).decode()


def decode_slots(word: str) -> dict[str, list[int]]:
    """Unpack what `encode_slots` made; ValueError on anything else."""
    try:
        slots = json.loads(base64.urlsafe_b64decode(word))
        return {str(host): [int(slot) for slot in numbers] for host, numbers in slots.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError("--world_info: not what a craken launcher writes; it is set by the launcher alone") from error


def node_words(options: LaunchOptions, world: World, node_rank: int, *, is_agent: bool = False) -> list[str]:
    """Return the words of the host's own `craken launch`; `node_rank` -1 lets it find its number itself."""
    words = ["python" if options.venv_script else sys.executable, "-m", "craken.cli", "launch"]
    words += ["--world_info", encode_slots(world.slots), "--node_rank", str(node_rank)]
    words += ["--master_addr", world.master_addr, "--master_port", str(world.master_port)]
    words += ["--grace", f"{options.grace:g}", "--log_level", options.log_level]
    flags = ("module", "no_python", "no_local_rank", "bind_cores_to_rank", "elastic_training")
    words += [f"--{flag}" for flag in flags if getattr(options, flag)]
    if options.elastic_training:
        words += ["--max_restarts", str(options.max_restarts)]
    for flag in ("min_elastic_nodes", "max_elastic_nodes"):
        if getattr(options, flag) > 0:
            words += [f"--{flag}", str(getattr(options, flag))]
    if options.bind_core_list:
        words += ["--bind_core_list", options.bind_core_list]
    if options.enable_each_rank_log is not None:
        words += ["--enable_each_rank_log", str(options.enable_each_rank_log)]
    return [*words, *(["--agent"] if is_agent else []), options.user_script, *options.user_args]


def shell_line(words: Sequence[str], *, folder: str, environment: Mapping[str, str], venv_script: str = "") -> str:
    """Return one POSIX shell line that goes to `folder`, exports `environment` and becomes `words`."""
    steps = [f"cd {shlex.quote(folder)}"]
    names = [key for key in environment if _NAME.fullmatch(key)]  # a shell refuses others, exported functions for one
    steps += [f"export {key}={shlex.quote(environment[key])}" for key in names]
    if venv_script:
        steps.append(f". {shlex.quote(venv_script)}")
    return " && ".join([*steps, f"exec {shlex.join(words)}"])


def ssh_command(host: str, line: str, options: LaunchOptions) -> list[str]:
    """Return the ssh command for one host; no questions asked, a dead connection noticed within a minute."""
    port = ["-p", str(options.ssh_port)] if options.ssh_port else []
    alive = ["-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"]
    return ["ssh", *alive, *port, *shlex.split(options.launcher_args), host, f"sh -c {shlex.quote(line)}"]


def local_command(line: str) -> list[str]:
    """Return the command for the host we are on, which needs no carrier."""
    return ["sh", "-c", line]


def carrier_command(launcher: str, hosts: Sequence[str], line: str, options: LaunchOptions) -> list[str]:
    """Return the one command of pdsh, MPI or Slurm that runs `line` once on each of `hosts`."""
    return _CARRIERS[launcher](list(hosts), line, shlex.split(options.launcher_args))


def carrier_environment(launcher: str, options: LaunchOptions) -> dict[str, str]:
    """Return the variables that the carrier itself reads."""
    if launcher != "pdsh":
        return {}
    port = {"PDSH_SSH_ARGS_APPEND": f"-p {options.ssh_port}"} if options.ssh_port else {}
    return {"PDSH_RCMD_TYPE": "ssh", **port}


def pdsh_node_rank(line: str, marker: str) -> str:
    """Escape `line` for pdsh, which expands % itself, and put its number of the host in the place of `marker`."""
    return line.replace("%", "%%").replace(marker, "%n")


def node_rank_from(environment: Mapping[str, str], hosts: Sequence[str], host_names: Sequence[str]) -> int:
    """Find this host's number from what the carrier says, by name first: Slurm numbers hosts in an order of its own."""
    for name in (environment.get("SLURMD_NODENAME", ""), *host_names):
        if name in hosts:
            return list(hosts).index(name)
    for key in _MPI_RANKS:
        if key in environment:
            return int(environment[key])
    raise ValueError(
        f"cannot tell which of {', '.join(hosts)} this host is ({', '.join(host_names)}); "
        "name hosts in the hostfile as they name themselves, or give --node_rank"
    )


def _pdsh(hosts: list[str], line: str, extra: list[str]) -> list[str]:
    return ["pdsh", "-S", "-f", str(_PDSH_FAN_OUT), "-w", ",".join(hosts), *extra, f"sh -c {shlex.quote(line)}"]


def _openmpi(hosts: list[str], line: str, extra: list[str]) -> list[str]:
    where = ["--host", ",".join(f"{host}:1" for host in hosts), "--map-by", "ppr:1:node", "--bind-to", "none"]
    return ["mpirun", "-n", str(len(hosts)), *where, *extra, "sh", "-c", line]


def _mpich(hosts: list[str], line: str, extra: list[str]) -> list[str]:
    return ["mpiexec", "-n", str(len(hosts)), "-ppn", "1", "-hosts", ",".join(hosts), *extra, "sh", "-c", line]


def _impi(hosts: list[str], line: str, extra: list[str]) -> list[str]:
    where = ["-ppn", "1", "-hosts", ",".join(hosts), "-genv", "I_MPI_PIN", "0"]
    return ["mpirun", "-n", str(len(hosts)), *where, *extra, "sh", "-c", line]


def _slurm(hosts: list[str], line: str, extra: list[str]) -> list[str]:
    where = ["-N", str(len(hosts)), "-n", str(len(hosts)), "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}"]
    return ["srun", *where, "--cpu-bind=none", "--kill-on-bad-exit=1", *extra, "sh", "-c", line]


_CARRIERS = {"pdsh": _pdsh, "openmpi": _openmpi, "mpich": _mpich, "impi": _impi, "slurm": _slurm}
