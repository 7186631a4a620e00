"""Two hosts on one machine: network namespaces joined by a veth pair, an sshd with a throwaway key in each."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PORT = 2222
_SUBNET = "10.213.77"


@dataclass(frozen=True)
class Hosts:
    """Two reachable hosts; commands are run on the first."""

    names: tuple[str, str]  # of the namespaces
    addresses: tuple[str, str]
    ssh_words: str  # options that every ssh to them needs

    def popen(self, words: list[str], **options: object) -> subprocess.Popen[str]:
        inside = ["ip", "netns", "exec", self.names[0], *words]
        return subprocess.Popen(inside, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload,no-any-return]


def why_not() -> str:
    """Return why two hosts cannot be had on this machine, "" when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            return f"no `{program}` here"
    if not Path("/usr/sbin/sshd").exists():
        return "no sshd here"
    probe = f"craken-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode != 0:
        return "this kernel or container allows no network namespaces"
    _run("ip", "netns", "del", probe)
    return ""


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make two namespaces with sshd; everything is gone afterwards, whatever happened."""
    _sweep()
    tag = os.getpid()
    names = (f"craken-a{tag}", f"craken-b{tag}")
    addresses = (f"{_SUBNET}.1", f"{_SUBNET}.2")
    with ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_delete_namespace, name)
        _join(names, addresses, tag)
        key = _make_keys(folder)
        for name, address in zip(names, addresses, strict=True):
            stack.callback(_end, _start_sshd(name, address, folder))
        known = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        hosts = Hosts(names, addresses, f"-i {key} {known}")
        _await_sshd(hosts)
        yield hosts


def _sweep() -> None:
    """Delete what a test run left behind that was itself killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in re.findall(r"^craken-[ab]\d+", listed, re.MULTILINE):
        if not Path(f"/proc/{name.removeprefix('craken-')[1:]}").exists():
            _delete_namespace(name)


def _join(names: tuple[str, str], addresses: tuple[str, str], tag: int) -> None:
    ends = (f"crk{tag}a", f"crk{tag}b")
    _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
    for name, end, address in zip(names, ends, addresses, strict=True):
        _run("ip", "link", "set", end, "netns", name)
        _run("ip", "-n", name, "link", "set", end, "name", "eth0")
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")
        _run("ip", "-n", name, "link", "set", "lo", "up")


def _make_keys(folder: Path) -> Path:
    key = folder / "user_key"
    for name in ("user_key", "host_key"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "authorized").write_text((folder / "user_key.pub").read_text())
    (folder / "authorized").chmod(0o600)
    return key


def _start_sshd(name: str, address: str, folder: Path) -> subprocess.Popen[bytes]:
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "ListenAddress": address,
        "Port": PORT,
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
    }
    words = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    return subprocess.Popen(
        ["ip", "netns", "exec", name, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *words],
        stderr=(folder / f"sshd_{name}.log").open("wb"),
    )


def _await_sshd(hosts: Hosts) -> None:
    probe = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
    deadline_s = time.monotonic() + 10
    for address in hosts.addresses:
        words = ["ip", "netns", "exec", hosts.names[0], "python3", "-c", probe, address, str(PORT)]
        while subprocess.run(words, capture_output=True).returncode != 0:
            assert time.monotonic() < deadline_s, f"no sshd at {address}"
            time.sleep(0.05)


def _delete_namespace(name: str) -> None:
    """End every process inside, then the namespace; both may be gone already."""
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    for pid in inside.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), 9)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def pids_in(name: str) -> list[int]:
    """Return the processes that run in a namespace."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid in listed.split()]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(5)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def free_port() -> int:
    """Return a port that is free in this process's own network."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
