"""What ranks find in their environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from craken.launch.env import (
    World,
    exported_environment,
    parse_env_file,
    rank_environment,
    read_env_files,
    visible_devices,
)

WORLD = World({"a": [1, 3, 5], "b": [0, 2]}, "10.0.0.1", 29501)


def test_ranks_are_numbered_host_by_host() -> None:
    assert rank_environment(WORLD, 1, 1) == {
        "RANK": "4",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29501",
    }


def test_slots_number_the_devices_that_are_visible() -> None:
    assert visible_devices([1, 3], None) == "1,3"
    assert visible_devices([1], "4,GPU-77") == "GPU-77"
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=4,5"):
        visible_devices([0, 2], "4,5")


def test_a_file_of_variables_is_lines_of_key_and_value() -> None:
    assert parse_env_file("A=1\n\n# no\nB=x=y z\nA=2\n", "f") == {"A": "2", "B": "x=y z"}
    with pytest.raises(ValueError, match="f, line 2: expected KEY=VALUE, got 'nonsense'"):
        parse_env_file("A=1\nnonsense\n", "f")


def test_the_working_folders_file_wins_over_the_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    (home / "vars").write_text("A=home\nB=home\n")
    (work / "vars").write_text("A=work\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    assert read_env_files("vars") == {"A": "work", "B": "home"}


def test_secrets_do_not_go_onto_command_lines() -> None:
    environment = {"NCCL_DEBUG": "INFO", "HF_TOKEN": "s", "PYTHONPATH": "p", "SHELL": "sh", "CRAKEN_API_KEY": "s"}
    assert exported_environment(environment) == {"NCCL_DEBUG": "INFO", "PYTHONPATH": "p"}
