"""Where a job runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from craken.config import load_config
from craken.launch import place
from craken.launch.arguments import parse
from craken.launch.place import Place, check_config, choose_place, config_path
from craken.launch.remote import encode_slots


@pytest.fixture(autouse=True)
def no_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "count_accelerators", lambda: 0)
    monkeypatch.setattr(place, "may_have_accelerators", lambda: False)


def _place(*words: str) -> Place:
    return choose_place(parse([*words, "train.py"], "deepspeed"))


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("worker-0 slots=4\nworker-1 slots=2\n")
    return f"--hostfile={path}"


def test_without_accelerators_ranks_run_on_the_cpu() -> None:
    assert _place().world.slots == {"localhost": [0, 1]}
    assert _place("--num_gpus=5").world.size == 5
    assert _place("--include=localhost:1").world.slots == {"localhost": [1]}


def test_accelerators_get_a_rank_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "count_accelerators", lambda: 4)
    assert (_place().world.size, _place().restricts_devices) == (4, False)
    assert _place("--num_gpus=2").world.slots == {"localhost": [0, 1]}
    assert _place("--exclude=localhost:0").restricts_devices
    with pytest.raises(ValueError, match="--num_gpus: 5 asked for, 4 accelerators found"):
        _place("--num_gpus=5")


def test_a_hostfile_sends_ranks_to_its_hosts(hostfile: str) -> None:
    found = _place(hostfile)
    assert found.is_remote
    assert (found.world.size, found.world.master_addr, found.world.master_port) == (6, "worker-0", 29500)
    assert _place(hostfile, "--num_gpus=1", "--master_addr=10.0.0.1").world.master_addr == "10.0.0.1"


def test_one_host_is_this_host_unless_it_is_to_be_reached(hostfile: str) -> None:
    alone = _place(hostfile, "--include=worker-1")
    assert (alone.is_remote, alone.world.slots, alone.world.master_addr) == (False, {"worker-1": [0, 1]}, "127.0.0.1")
    assert _place(hostfile, "--include=worker-1", "--force_multi").is_remote


def test_no_ssh_runs_this_hosts_part(hostfile: str) -> None:
    part = _place(hostfile, "--no_ssh", "--node_rank=1")
    assert (part.is_remote, part.node_rank, part.world.first_rank(1)) == (False, 1, 4)


def test_hosts_started_by_hand_are_alike() -> None:
    part = _place("--num_nodes=2", "--num_gpus=8", "--node_rank=1", "--master_addr=192.168.1.100")
    assert (part.node_rank, part.world.size, part.world.first_rank(1)) == (1, 16, 8)


def test_an_agent_runs_what_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    info = f"--world_info={encode_slots({'a': [0, 1], 'b': [3]})}"
    assert _place(info, "--node_rank=1", "--master_addr=a").world.local_slots(1) == [3]
    monkeypatch.setenv("SLURMD_NODENAME", "b")
    assert _place(info, "--master_addr=a").node_rank == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_nodes=2"], "which hosts"),
        (["--num_nodes=2", "--no_ssh"], "--node_rank: expected 0 to 1, this host's number, got nothing"),
        (["--num_nodes=2", "--node_rank=2", "--master_addr=a"], "--node_rank: expected 0 to 1"),
        (["--num_nodes=2", "--node_rank=1"], "--master_addr: needed"),
        (["--node_rank=1"], "give --num_nodes too"),
        (["--force_multi"], "no hosts to reach"),
        (["--hostfile=/nowhere/hosts"], "no such file"),
        (["--world_info=xx"], "--world_info"),
    ],
)
def test_what_is_missing_is_asked_for(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _place(*words)


def test_localhost_is_no_address_for_other_hosts(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=1\nworker-1 slots=1\n")
    with pytest.raises(ValueError, match="--master_addr"):
        _place(f"--hostfile={tmp_path / 'hosts'}")


def test_the_scripts_config_is_found_in_both_spellings() -> None:
    assert config_path(["--lr", "1", "--deepspeed_config", "a.json"]) == "a.json"
    assert config_path(["--deepspeed_config=b.json", "x"]) == "b.json"
    assert config_path(["--deepspeed", "--deepspeed_config"]) is None


def test_the_launcher_refuses_a_wrong_config_and_leaves_what_has_no_effect_for_rank_0_to_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("craken.config.load.warn_once", said.append)
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 1, "zero_optimization": {"legacy_stage1": true}}')
    check_config([f"--deepspeed_config={path}"])
    assert said == []
    load_config(path)
    assert len(said) == 1
    path.write_text('{"zero_optimization": {"stagee": 1}}')
    with pytest.raises(ValueError, match="zero_optimization.stagee"):
        check_config([f"--deepspeed_config={path}"])
