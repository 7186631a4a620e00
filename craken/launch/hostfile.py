"""Reads the hosts of a job and picks among them: hostfile, include and exclude filters, limits; pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LINE = re.compile(r"(?P<host>[^\s=@:,]+|\[[0-9a-fA-F:]+\])\s+slots\s*=\s*(?P<slots>\d+)")


def parse_hostfile(text: str, name: str = "hostfile") -> dict[str, list[int]]:
    """Parse lines `worker-1 slots=8` into {host: [0, ..., 7]}, in order; blank lines and # comments are skipped.

    Raises ValueError with file and line on anything else, on a host named twice and on a file without hosts.
    """
    hosts: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = _LINE.fullmatch(entry)
        if match is None:
            raise ValueError(f"{name}, line {number}: expected `host slots=N`, got {line.strip()!r}")
        host, num_slots = match["host"], int(match["slots"])
        if num_slots == 0:
            raise ValueError(f"{name}, line {number}: {host} has no slots; give it at least 1 or take the line out")
        if host in hosts:
            raise ValueError(f"{name}, line {number}: {host} stands here twice; give all its slots on one line")
        hosts[host] = list(range(num_slots))
    if not hosts:
        raise ValueError(f"{name}: no hosts in it; expected lines `host slots=N`")
    return hosts


def parse_filter(text: str, flag: str) -> dict[str, list[int]]:
    """Parse `worker-0@worker-1:0,2` into {"worker-0": [], "worker-1": [0, 2]}; [] stands for all slots."""
    chosen: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, colon, slots = part.strip().partition(":")
        numbers = slots.split(",") if colon else []
        if not host or not all(number.strip().isdigit() for number in numbers):
            raise ValueError(f"{flag}: expected HOST[:SLOT,SLOT...] joined by @, got {part!r} in {text!r}")
        chosen[host] = sorted({*chosen.get(host, []), *(int(number) for number in numbers)})
    return chosen


def apply_filters(hosts: Mapping[str, list[int]], include: str = "", exclude: str = "") -> dict[str, list[int]]:
    """Keep the hosts and slots that `include` names, or all but those that `exclude` names.

    Raises ValueError when both are given, when one names a host or slot that is not there, or when nothing is left.
    """
    if include and exclude:
        raise ValueError("--include and --exclude exclude each other; give the shorter of the two")
    flag, text = ("--include", include) if include else ("--exclude", exclude)
    if not text:
        return dict(hosts)
    named = _named_slots(hosts, parse_filter(text, flag), flag)
    if include:
        return {host: named[host] for host in hosts if host in named}
    left = {host: [slot for slot in slots if slot not in named.get(host, [])] for host, slots in hosts.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ValueError(f"--exclude {text}: leaves no slot of {_listing(hosts)}; exclude less")
    return left


def limit(hosts: Mapping[str, list[int]], num_nodes: int, num_slots: int) -> dict[str, list[int]]:
    """Keep the first `num_nodes` hosts and the first `num_slots` slots of each; -1 keeps all."""
    if num_nodes > len(hosts):
        raise ValueError(f"--num_nodes: {num_nodes} asked for, the hostfile has {len(hosts)}: {_listing(hosts)}")
    kept = list(hosts.items())[: num_nodes if num_nodes > 0 else None]
    for host, slots in kept:
        if num_slots > len(slots):
            raise ValueError(f"--num_gpus: {num_slots} asked for, {host} has {len(slots)} slots; ask for at most those")
    return {host: slots[: num_slots if num_slots > 0 else None] for host, slots in kept}


def _named_slots(hosts: Mapping[str, list[int]], named: dict[str, list[int]], flag: str) -> dict[str, list[int]]:
    for host, slots in named.items():
        if host not in hosts:
            raise ValueError(f"{flag}: no host {host!r}; there are {_listing(hosts)}")
        missing = [slot for slot in slots if slot not in hosts[host]]
        if missing:
            raise ValueError(f"{flag}: {host} has no slot {missing[0]}; it has {hosts[host]}")
    return {host: slots or hosts[host] for host, slots in named.items()}


def _listing(hosts: Mapping[str, list[int]]) -> str:
    shown = [f"{host} ({len(slots)} slots)" for host, slots in list(hosts.items())[:8]]
    return ", ".join(shown) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
