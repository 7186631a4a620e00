"""The environment of ranks: what the launcher sets for each, and the file of variables that users add."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEEPSPEED_ENVIRONMENT_NAME = os.environ.get("DS_ENV_FILE", ".deepspeed_env")

# Sent to other hosts besides the file above: what steers the interpreter and the communication libraries.
_EXPORTED_PREFIXES = ("NCCL", "GLOO", "UCX", "MV2", "PYTHON", "TORCH", "OMP_", "CRAKEN_", "HF_")
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY")  # other users of a host can read command lines


@dataclass(frozen=True)
class World:
    """The whole job as each rank must know it: ranks are numbered host by host, slot by slot."""

    slots: Mapping[str, Sequence[int]]  # host -> accelerator numbers there, one rank each; first host holds rank 0
    master_addr: str
    master_port: int

    @property
    def size(self) -> int:
        return sum(len(slots) for slots in self.slots.values())

    @property
    def hosts(self) -> list[str]:
        return list(self.slots)

    def first_rank(self, node_rank: int) -> int:
        return sum(len(slots) for slots in list(self.slots.values())[:node_rank])

    def local_slots(self, node_rank: int) -> list[int]:
        return list(self.slots[self.hosts[node_rank]])


def rank_environment(world: World, node_rank: int, local_rank: int) -> dict[str, str]:
    """Return the variables that tell one rank where it stands."""
    num_local = len(world.local_slots(node_rank))
    return {
        "RANK": str(world.first_rank(node_rank) + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(num_local),
        "LOCAL_SIZE": str(num_local),
        "CROSS_RANK": str(node_rank),
        "CROSS_SIZE": str(len(world.hosts)),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(world.master_port),
    }


def visible_devices(slots: Sequence[int], already_visible: str | None) -> str:
    """Return CUDA_VISIBLE_DEVICES for `slots`, which number the devices that are visible already when that is set."""
    if not already_visible:
        return ",".join(str(slot) for slot in slots)
    devices = already_visible.split(",")
    beyond = [slot for slot in slots if slot >= len(devices)]
    if beyond:
        raise ValueError(
            f"slots {beyond} do not exist, CUDA_VISIBLE_DEVICES={already_visible} leaves 0 to {len(devices) - 1}; "
            "unset it or choose among those"
        )
    return ",".join(devices[slot] for slot in slots)


def parse_env_file(text: str, name: str) -> dict[str, str]:
    """Parse lines `KEY=VALUE`; blank lines and lines that start with # are skipped, later lines win."""
    variables: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{name}, line {number}: expected KEY=VALUE, got {line!r}")
        variables[key.strip()] = value
    return variables


def read_env_files(name: str = DEEPSPEED_ENVIRONMENT_NAME) -> dict[str, str]:
    """Read the variables that users add for every rank, from the home folder first and the working folder over it."""
    variables: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        path = folder / name
        if path.is_file():
            variables.update(parse_env_file(path.read_text(), str(path)))
    return variables


def exported_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Pick the variables of this process that ranks on other hosts should have too, secrets left out."""
    return {
        key: value
        for key, value in sorted(environment.items())
        if key.startswith(_EXPORTED_PREFIXES) and not any(word in key for word in _SECRET_WORDS)
    }
