"""Real launches on this host: what ranks are given, how a failure ends the job, how signals reach ranks."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from craken.launch import launch_local
from craken.launch.ports import find_free_port
from tests.launch import programs


def _seen(text: str) -> list[dict[str, object]]:
    records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return sorted(records, key=lambda record: int(record["RANK"]))


def _port() -> str:
    return f"--master_port={find_free_port()}"


def test_each_rank_is_told_where_it_stands(tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.SHOW)
    (tmp_path / ".deepspeed_env").write_text("FROM_FILE=a b=c\n")
    done = programs.run(["--num_gpus=2", _port(), script, "--flag", "x y"], tmp_path)
    first, second = _seen(done.stdout)
    assert done.returncode == 0, done.stderr
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "1", "1")
    assert {first[key] for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")} == {"2"}
    assert (first["CROSS_RANK"], first["CROSS_SIZE"], first["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert second["argv"] == ["--local_rank=1", "--flag", "x y"]
    assert first["FROM_FILE"] == "a b=c"
    assert (first["name"], first["path0"]) == ("__main__", str(tmp_path))
    assert int(str(first["OMP_NUM_THREADS"])) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_no_local_rank_leaves_the_arguments_alone(tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.SHOW)
    done = programs.run(["--num_gpus=1", "--no_local_rank", _port(), script, "--a"], tmp_path)
    assert _seen(done.stdout)[0]["argv"] == ["--a"]


def test_modules_and_programs_can_be_launched(tmp_path: Path) -> None:
    programs.write(tmp_path, programs.SHOW)
    done = programs.run(["--num_gpus=1", "--module", _port(), "program", "--a"], tmp_path)
    assert _seen(done.stdout)[0]["argv"] == ["--local_rank=0", "--a"]
    done = programs.run(["--num_gpus=2", "--no_python", "--no_local_rank", _port(), "printenv", "RANK"], tmp_path)
    assert sorted(done.stdout.split()) == ["0", "1"]


def test_ranks_are_bound_to_cores_of_their_own(tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    words = ["--num_gpus=2", "--bind_cores_to_rank", f"--bind_core_list={cores[0]},{cores[1]}", _port()]
    first, second = _seen(programs.run([*words, programs.write(tmp_path, programs.SHOW)], tmp_path).stdout)
    assert (first["cores"], second["cores"]) == ([cores[0]], [cores[1]])
    assert first["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(("how", "code", "words"), [("raise", 1, "boom"), ("exit", 7, ""), ("kill", 137, "SIGKILL")])
def test_a_dead_rank_ends_the_job_with_its_code_and_its_reason(tmp_path: Path, how: str, code: int, words: str) -> None:
    begin_s = time.monotonic()
    done = programs.run(["--num_gpus=2", _port(), programs.write(tmp_path, programs.FAIL), how], tmp_path)
    assert done.returncode == code
    assert "rank 1" in done.stderr
    assert "last words" in done.stderr
    assert words in done.stderr
    assert done.stderr.count("Traceback") == (how == "raise")
    assert "guard.py" not in done.stderr
    assert time.monotonic() - begin_s < 5


def test_the_cause_is_named_when_its_victim_ends_first(tmp_path: Path) -> None:
    done = programs.run(["--num_gpus=2", _port(), programs.write(tmp_path, programs.VICTIM_FIRST)], tmp_path)
    assert "rank 1" in done.stderr.partition("failed first")[0]
    assert "ValueError: the cause" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "rank 0" in done.stderr.partition("failed first")[2]


def test_a_gloo_peer_that_loses_its_rank_is_not_blamed(tmp_path: Path) -> None:
    done = programs.run(["--num_gpus=2", _port(), programs.write(tmp_path, programs.SUM), "raise"], tmp_path)
    assert done.returncode == 1
    assert "ValueError: boom" in done.stderr
    assert done.stderr.count("Traceback") == 1


def test_a_rank_that_raises_and_then_hangs_ends_the_job(tmp_path: Path) -> None:
    begin_s = time.monotonic()
    done = programs.run(["--num_gpus=2", _port(), programs.write(tmp_path, programs.STUCK)], tmp_path)
    assert done.returncode == 1
    assert "rank 1" in done.stderr.partition("failed first")[0]
    assert "ValueError: boom" in done.stderr
    assert time.monotonic() - begin_s < 12


def test_ctrl_z_stops_ranks_and_they_go_on_after_it(tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.SAVE)
    launcher = programs.start(["--num_gpus=1", _port(), script, "0"], tmp_path)
    programs.read_until(launcher, "ready", 1)
    (rank,) = (pid for pid in programs.processes_of(script) if pid != launcher.pid)
    launcher.send_signal(signal.SIGTSTP)
    assert _has_state(rank, "T")
    launcher.send_signal(signal.SIGCONT)
    assert _has_state(rank, "S")
    launcher.send_signal(signal.SIGTERM)
    assert "saved after SIGTERM" in launcher.communicate(timeout=10)[0]


def _has_state(pid: int, state: str) -> bool:
    """Wait up to 5 s for a process to be in a state, as /proc names it."""
    deadline_s = time.monotonic() + 5
    while f"State:\t{state}" not in Path(f"/proc/{pid}/status").read_text():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def test_a_rank_that_ignores_sigterm_is_killed_within_seconds(tmp_path: Path) -> None:
    begin_s = time.monotonic()
    done = programs.run(["--num_gpus=2", _port(), programs.write(tmp_path, programs.STUBBORN)], tmp_path)
    assert done.returncode == 1
    assert time.monotonic() - begin_s < 9


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_rank_once_and_leaves_time_to_save(tmp_path: Path, signum: signal.Signals) -> None:
    launcher = programs.start(["--num_gpus=2", _port(), programs.write(tmp_path, programs.SAVE), "0.3"], tmp_path)
    programs.read_until(launcher, "ready", 2)
    launcher.send_signal(signum)
    rest = launcher.communicate(timeout=20)[0]
    assert launcher.returncode == 0
    assert rest.count(f"saved after {signum.name}\n") == 2


def test_a_second_interrupt_stops_ranks_that_still_save(tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.SAVE)
    launcher = programs.start(["--num_gpus=2", _port(), script, "50"], tmp_path)
    programs.read_until(launcher, "ready", 2)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.8)
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=10)
    assert launcher.returncode == 137
    assert not programs.processes_of(script)


def test_the_grace_ends(tmp_path: Path) -> None:
    words = ["--num_gpus=2", "--grace=0.5", _port(), programs.write(tmp_path, programs.SAVE), "50"]
    launcher = programs.start(words, tmp_path)
    programs.read_until(launcher, "ready", 2)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=10)
    assert launcher.returncode == 137


def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.SAVE)
    launcher = programs.start(["--num_gpus=2", _port(), script, "0"], tmp_path)
    programs.read_until(launcher, "ready", 2)
    launcher.kill()
    rest = launcher.communicate(timeout=10)[0]
    assert rest.count("saved after SIGTERM") == 2
    assert not programs.processes_of(script)


def test_ranks_see_the_terminal_and_ctrl_c_in_it_reaches_them_once(tmp_path: Path) -> None:
    text = programs.SHOW + programs.SAVE
    words = programs.command("--num_gpus=2", _port(), programs.write(tmp_path, text), "0.2")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(words[0], words, programs.environment())
    shown = _read_terminal(terminal, "ready", 2)
    os.write(terminal, b"\x03")
    shown += _read_terminal(terminal, "saved after", 2)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    first, second = _seen(shown.replace("\r", ""))
    assert first["tty"] == [True, True, True]
    assert second["tty"] == [False, True, True]
    assert shown.count("saved after SIGINT\r\n") == 2
    assert code == 0


def _read_terminal(terminal: int, words: str, times: int) -> str:
    text, deadline_s = "", time.monotonic() + 20
    while text.count(words) < times or not text.endswith("\n"):
        assert time.monotonic() < deadline_s, text
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 4096).decode()
    return text


def test_each_rank_log_keeps_a_copy_of_what_streams_through(tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.FAIL)
    done = programs.run(["--num_gpus=2", "--enable_each_rank_log=logs", _port(), script, "exit"], tmp_path)
    (log,) = (tmp_path / "logs").glob("*_rank1.log")
    assert log.read_text() == "last words\n"
    assert "last words" in done.stderr


def test_a_taken_port_is_named_before_a_rank_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = programs.run(
            ["--num_gpus=1", f"--master_port={port}", programs.write(tmp_path, programs.SHOW)], tmp_path
        )
    assert done.returncode == 2
    assert f"port {port}" in done.stderr
    assert "--master_port" in done.stderr
    assert done.stdout == ""


def test_a_wrong_config_is_refused_once_before_a_rank_starts(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_sizee": 4}')
    script = programs.write(tmp_path, programs.SHOW)
    done = programs.run(["--num_gpus=2", script, "--deepspeed_config", "ds.json"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("train_batch_sizee") == 1
    assert done.stdout == ""


def test_a_missing_script_or_program_is_named(tmp_path: Path) -> None:
    assert "no such file" in programs.run(["--num_gpus=1", "nowhere.py"], tmp_path).stderr
    assert "not found on PATH" in programs.run(["--num_gpus=1", "--no_python", "nowhere"], tmp_path).stderr


def test_the_pid_file_lives_as_long_as_the_job(tmp_path: Path) -> None:
    script = programs.write(tmp_path, "import glob; print(glob.glob('*.ds'))")
    done = programs.run(["--num_gpus=1", "--save_pid", _port(), script], tmp_path, TMPDIR=str(tmp_path))
    assert ".ds" in done.stdout
    assert not list(tmp_path.glob("*.ds"))


def test_launching_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys, craken.launch, craken.cli; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=programs.environment(), cwd=tmp_path).returncode == 0


def test_launch_local_returns_the_code_of_the_rank_that_failed(tmp_path: Path) -> None:
    script = programs.write(tmp_path, "import os, sys; sys.exit(5 * int(os.environ['RANK']))")
    assert launch_local([sys.executable, script], 2) == 5
    assert launch_local([sys.executable, script], 1) == 0


def test_launch_local_names_a_program_that_cannot_start() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        launch_local(["/nowhere/program"], 2)


def test_an_elastic_job_restarts_and_then_ends_well(tmp_path: Path) -> None:
    text = """
import os, pathlib, sys, time
mark = pathlib.Path("died")
if os.environ["RANK"] == "1" and not mark.exists():
    mark.touch()
    raise ValueError("boom")
while not mark.exists():
    time.sleep(0.05)
if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    time.sleep(60)
print("attempt", os.environ["TORCHELASTIC_RESTART_COUNT"], sys.argv[1:])
"""
    words = ["--num_gpus=2", "--elastic_training", "--max_restarts=1", _port(), programs.write(tmp_path, text)]
    done = programs.run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attempt 1 ['--local_rank=1']" in done.stdout


def test_an_elastic_job_that_gives_up_reports_the_cause(tmp_path: Path) -> None:
    script = programs.write(tmp_path, programs.FAIL)
    done = programs.run(["--num_gpus=2", "--elastic_training", "--max_restarts=0", _port(), script, "exit"], tmp_path)
    assert done.returncode == 7
    assert "rank 1" in done.stderr
