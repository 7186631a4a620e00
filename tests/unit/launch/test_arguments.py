"""The launcher's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from craken.launch.arguments import LaunchOptions, parse


def _parse(*words: str) -> LaunchOptions:
    return parse([*words, "train.py", "--lr", "1"], "deepspeed")


def test_everything_after_the_script_is_the_scripts() -> None:
    options = parse(["--num_gpus=4", "train.py", "--num_gpus", "8", "--", "x"], "deepspeed")
    assert (options.num_gpus, options.user_script) == (4, "train.py")
    assert options.user_args[:2] == ["--num_gpus", "8"]


def test_every_flag_of_the_original_is_understood() -> None:
    options = _parse(
        *("-H", "hosts", "-i", "a:0", "--master_port", "1", "--master_addr", "b", "--node_rank", "1", "--no_ssh_check"),
        *("--launcher", "OPENMPI", "--launcher_args", "--mca btl tcp", "--module", "--no_local_rank", "--no_ssh"),
        *("--force_multi", "--save_pid", "--enable_each_rank_log", "logs", "--elastic_training"),
        *("--min_elastic_nodes", "1", "--max_elastic_nodes", "2", "--bind_cores_to_rank", "--bind_core_list", "0-3"),
        *("--ssh_port", "22", "--venv_script", "v", "--log_level", "debug"),
    )
    assert (options.launcher, options.launcher_args, options.ssh_port) == ("openmpi", "--mca btl tcp", 22)
    assert options.enable_each_rank_log == Path("logs")
    assert _parse("--num_accelerators", "3", "-q").num_gpus == 3
    assert _parse("-q").log_level == "error"


def _accelerates(launcher: str, *filters: str) -> list[str]:
    """Return what accelerate 1.x runs on two machines of two processes; for "standard" it starts torch's own ranks."""
    how = ["--node_rank", "1", "--no_ssh"] if launcher == "nossh" else ["--no_local_rank", "--launcher", launcher]
    where = list(filters) or ["--num_gpus", "2"]
    return ["--hostfile", "hosts", *how, *where, "--master_addr", "10.0.0.1", "--master_port", "29500"]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "mpich", "slurm", "nossh"])
def test_what_accelerate_writes_is_understood(launcher: str) -> None:
    options = _parse(*_accelerates(launcher))
    assert (options.hostfile, options.num_gpus) == ("hosts", 2)
    assert (options.master_addr, options.master_port) == ("10.0.0.1", 29500)
    assert (options.user_script, options.user_args) == ("train.py", ["--lr", "1"])
    if launcher == "nossh":
        assert (options.no_ssh, options.node_rank, options.launcher) == (True, 1, "")
    else:
        assert (options.no_local_rank, options.launcher, options.no_ssh) == (True, launcher, False)
    for flag in ("include", "exclude"):
        assert getattr(_parse(*_accelerates(launcher, f"--{flag}", "a:0,1@b:2")), flag) == "a:0,1@b:2"
    assert parse([*_accelerates(launcher), "--module", "train"], "deepspeed").module
    assert parse([*_accelerates(launcher), "--no_python", "train"], "deepspeed").no_python
    assert _parse("--hostfile", "None").hostfile == "None"  # where its own file names none


def test_launcher_args_may_begin_with_a_dash() -> None:
    assert _parse("--launcher_args", "-i key").launcher_args == "-i key"
    assert _parse("--launcher_args", "-v").launcher_args == "-v"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--module", "--no_python"], "--module and --no_python"),
        (["--include=a", "--num_gpus=2"], "--include/--exclude and --num_nodes/--num_gpus"),
        (["--num_gpus=0"], "--num_gpus: expected at least 1, got 0"),
        (["--num_nodes=-2"], "--num_nodes: expected at least 1, got -2"),
        (["--node_rank=-3"], "--node_rank"),
        (["--grace=-1"], "--grace"),
        (["--min_elastic_nodes=1"], "--elastic_training only"),
        (["--bind_core_list=0"], "--bind_cores_to_rank only"),
    ],
)
def test_what_cannot_work_together_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _parse(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--autotuning=run"], "--autotuning"), (["--launcher=mvapich"], "mpich"), (_accelerates("mvapich"), "mpich")],
)
def test_a_documented_gap_says_what_to_do(words: list[str], message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        _parse(*words)


def test_an_unknown_flag_ends_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _parse("--num_gpu=2")
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
