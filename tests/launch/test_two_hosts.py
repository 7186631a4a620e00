"""Real launches on two hosts: network namespaces with an sshd each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import namespaces, programs

_WHY_NOT = namespaces.why_not()
pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(_WHY_NOT), reason=_WHY_NOT)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[namespaces.Hosts]:
    with namespaces.two_hosts(tmp_path_factory.mktemp("hosts")) as two:
        yield two


def _launch(hosts: namespaces.Hosts, folder: Path, program: str, *words: str) -> subprocess.Popen[str]:
    """Start `program` over ssh from the first host, one rank a host."""
    (folder / "hostfile").write_text("".join(f"{address} slots=2\n" for address in hosts.addresses))
    flags = ["--hostfile", "hostfile", "--num_gpus=1", "--ssh_port", str(namespaces.PORT)]
    (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nFROM_FILE=it's here\n")
    return hosts.popen(
        programs.command(*flags, "--launcher_args", hosts.ssh_words, programs.write(folder, program), *words),
        cwd=folder,
        env=programs.environment(),
        start_new_session=True,
    )


def _no_ranks_left(hosts: namespaces.Hosts, script: str, within_s: float = 3) -> bool:
    deadline_s = time.monotonic() + within_s
    while programs.processes_of(script) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not programs.processes_of(script)


def test_ranks_on_two_hosts_meet_and_sum(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    launcher = _launch(hosts, tmp_path, programs.SUM, "ok")
    text = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 0, text
    assert "rank 0 sum 2" in text
    assert "rank 1 sum 2" in text


def test_each_host_gets_its_rank_and_the_users_variables(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    text = _launch(hosts, tmp_path, programs.SHOW, "a b").communicate(timeout=60)[0]
    assert text.count('"argv": ["--local_rank=0", "a b"]') == 2
    assert text.count(f'"MASTER_ADDR": "{hosts.addresses[0]}"') == 2
    assert text.count('"FROM_FILE": "it\'s here"') == 2
    assert '"CROSS_RANK": "1", "CROSS_SIZE": "2"' in text


def test_a_rank_that_fails_on_one_host_ends_the_other_and_is_shown_once(
    hosts: namespaces.Hosts, tmp_path: Path
) -> None:
    begin_s = time.monotonic()
    launcher = _launch(hosts, tmp_path, programs.SUM, "raise")
    text = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 1
    assert text.count("ValueError: boom") == 1
    assert text.count("Traceback") == 1
    assert f"rank 1 ({hosts.addresses[1]}" in text
    assert time.monotonic() - begin_s < 15


def test_the_code_of_the_rank_comes_back_from_the_other_host(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    launcher = _launch(hosts, tmp_path, programs.FAIL, "exit")
    launcher.communicate(timeout=60)
    assert launcher.returncode == 7
    assert _no_ranks_left(hosts, str(tmp_path / "program.py"), 0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_both_hosts_with_time_to_save(
    hosts: namespaces.Hosts, tmp_path: Path, signum: signal.Signals
) -> None:
    launcher = _launch(hosts, tmp_path, programs.SAVE, "0.3")
    programs.read_until(launcher, "ready", 2)
    launcher.send_signal(signum)
    text = launcher.communicate(timeout=20)[0]
    assert text.count(f"saved after {signum.name}") == 2
    assert launcher.returncode == 0


def test_no_rank_outlives_a_killed_launcher(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    launcher = _launch(hosts, tmp_path, programs.SAVE, "0.2")
    programs.read_until(launcher, "ready", 2)
    launcher.kill()
    assert _no_ranks_left(hosts, str(tmp_path / "program.py"))
    launcher.communicate(timeout=10)


def test_a_host_that_is_cut_off_ends_the_job(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    launcher = _launch(hosts, tmp_path, programs.SAVE, "0.2")
    programs.read_until(launcher, "ready", 2)
    sessions = [pid for pid in namespaces.pids_in(hosts.names[1]) if _is_session(pid)]
    assert sessions
    for pid in sessions:
        os.kill(pid, signal.SIGKILL)
    text = launcher.communicate(timeout=20)[0]
    assert launcher.returncode == 255
    assert f"{hosts.addresses[1]}: ssh failed" in text
    assert _no_ranks_left(hosts, str(tmp_path / "program.py"))


def _is_session(pid: int) -> bool:
    """Claim that `pid` is an sshd that serves one connection."""
    return b"@" in Path(f"/proc/{pid}/cmdline").read_bytes() or b"[priv]" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_an_unreachable_host_is_named(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    flags = ["--hostfile", "hostfile", "--force_multi", "--ssh_port", "9", "--launcher_args", hosts.ssh_words]
    (tmp_path / "hostfile").write_text(f"{hosts.addresses[1]} slots=1\n")
    launcher = hosts.popen(
        programs.command(*flags, programs.write(tmp_path, programs.SHOW)), cwd=tmp_path, env=programs.environment()
    )
    text = launcher.communicate(timeout=20)[0]
    assert launcher.returncode == 255
    assert f"{hosts.addresses[1]}: ssh failed" in text


def test_each_host_may_be_started_by_hand(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.SUM)
    flags = ["--num_nodes=2", "--num_gpus=1", f"--master_addr={hosts.addresses[0]}"]
    launchers = []
    for node_rank, name in enumerate(hosts.names):
        words = programs.command(*flags, f"--node_rank={node_rank}", script, "ok")
        environment = programs.environment({"GLOO_SOCKET_IFNAME": "eth0"})
        launchers.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *words],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=sys.stderr,
                text=True,
            )
        )
    texts = [launcher.communicate(timeout=60)[0] for launcher in launchers]
    assert ["rank 0 sum 2" in texts[0], "rank 1 sum 2" in texts[1]] == [True, True]


def test_an_elastic_job_goes_on_without_a_host_that_is_lost(hosts: namespaces.Hosts, tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
    flags = ["--hostfile", "hostfile", "--ssh_port", str(namespaces.PORT), "--elastic_training"]
    launcher = hosts.popen(
        programs.command(*flags, "--launcher_args", hosts.ssh_words, programs.write(tmp_path, programs.ELASTIC_SUM)),
        cwd=tmp_path,
        env=programs.environment(),
    )
    programs.read_until(launcher, "sum 2", 2, timeout_s=60)
    for pid in filter(_is_session, namespaces.pids_in(hosts.names[1])):
        os.kill(pid, signal.SIGKILL)
    text = launcher.communicate(timeout=120)[0]
    assert f"{hosts.addresses[1]} is lost" in text
    assert "rank 0 sum 1" in text
    assert launcher.returncode == 0
    assert _no_ranks_left(hosts, str(tmp_path / "program.py"))
