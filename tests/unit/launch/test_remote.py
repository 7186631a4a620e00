"""The command lines that reach other hosts."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from craken.launch.arguments import LaunchOptions, parse
from craken.launch.env import World
from craken.launch.place import choose_place
from craken.launch.remote import (
    carrier_command,
    carrier_environment,
    node_rank_from,
    node_words,
    pdsh_node_rank,
    shell_line,
    ssh_command,
)

WORLD = World({"a": [0, 1], "b": [2]}, "a", 29500)


def _options(*words: str) -> LaunchOptions:
    return parse([*words, "train.py", "--name", "it's 100%"], "deepspeed")


def test_a_hosts_launcher_is_told_all_that_it_needs() -> None:
    flags = ["--module", "--no_local_rank", "--bind_cores_to_rank", "--bind_core_list=0-3", "--grace=5"]
    words = node_words(_options(*flags), WORLD, 1, is_agent=True)
    assert words[:4] == [sys.executable, "-m", "craken.cli", "launch"]
    again = parse(words[4:], "craken launch")
    assert (again.module, again.no_local_rank, again.bind_cores_to_rank) == (True, True, True)
    assert (again.bind_core_list, again.grace, again.agent) == ("0-3", 5.0, True)
    assert (again.user_script, again.user_args) == ("train.py", ["--name", "it's 100%"])
    found = choose_place(again)
    assert (found.world, found.node_rank) == (WORLD, 1)


def test_the_virtual_environments_python_is_used_when_there_is_one() -> None:
    assert node_words(_options("--venv_script=/v/activate"), WORLD, 0)[0] == "python"


def test_the_shell_line_survives_a_real_shell() -> None:
    words = [sys.executable, "-c", "import os,sys; print(os.getcwd(), os.environ['A'], sys.argv[1:])", "it's", "$HOME"]
    line = shell_line(words, folder="/", environment={"A": "x'y $Z", "BASH_FUNC_f%%": "() { :; }"})
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.stdout == """/ x'y $Z ["it's", '$HOME']\n"""


def test_ssh_gets_one_quoted_line() -> None:
    command = ssh_command("b", "cd / && exec true", _options("--ssh_port=2222", "--launcher_args=-i 'my key'"))
    assert command[0] == "ssh"
    assert command[-2:] == ["b", "sh -c 'cd / && exec true'"]
    assert command[command.index("-p") + 1] == "2222"
    assert command[command.index("-i") + 1] == "my key"


@pytest.mark.parametrize(
    ("launcher", "begin"),
    [
        ("pdsh", "pdsh -S -f 1024 -w a,b -x"),
        ("openmpi", "mpirun -n 2 --host a:1,b:1 --map-by ppr:1:node --bind-to none -x sh -c"),
        ("mpich", "mpiexec -n 2 -ppn 1 -hosts a,b -x sh -c"),
        ("impi", "mpirun -n 2 -ppn 1 -hosts a,b -genv I_MPI_PIN 0 -x sh -c"),
        ("slurm", "srun -N 2 -n 2 --ntasks-per-node=1 --nodelist=a,b --cpu-bind=none --kill-on-bad-exit=1 -x sh -c"),
    ],
)
def test_a_carrier_runs_the_line_once_on_each_host(launcher: str, begin: str) -> None:
    command = carrier_command(launcher, ["a", "b"], "exec true", _options("--launcher_args=-x"))
    assert shlex.join(command).startswith(begin)
    assert command[-1] == ("sh -c 'exec true'" if launcher == "pdsh" else "exec true")


def test_pdsh_puts_the_hosts_number_in() -> None:
    line = shell_line(node_words(_options(), WORLD, -98765), folder="/", environment={})
    words = shlex.split(pdsh_node_rank(line, "-98765"))
    assert words[words.index("--node_rank") + 1] == "%n"
    assert words[-1] == "it's 100%%"
    assert carrier_environment("pdsh", _options("--ssh_port=7")) == {
        "PDSH_RCMD_TYPE": "ssh",
        "PDSH_SSH_ARGS_APPEND": "-p 7",
    }


@pytest.mark.parametrize(
    ("environment", "names", "rank"),
    [
        ({"SLURMD_NODENAME": "b", "SLURM_NODEID": "0"}, ["x"], 1),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ["b"], 1),
        ({"OMPI_COMM_WORLD_RANK": "1"}, ["x"], 1),
        ({"PMI_RANK": "0"}, ["x"], 0),
    ],
)
def test_a_host_finds_its_number_by_name_first(environment: dict[str, str], names: list[str], rank: int) -> None:
    assert node_rank_from(environment, ["a", "b"], names) == rank


def test_a_host_that_is_not_in_the_list_says_so() -> None:
    with pytest.raises(ValueError, match="cannot tell which of a, b this host is"):
        node_rank_from({}, ["a", "b"], ["x"])
