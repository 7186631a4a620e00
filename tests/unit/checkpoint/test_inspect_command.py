"""`craken inspect`: lines, tables, JSON, and an exit code for damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from craken import cli
from craken.checkpoint import inspect_command
from craken.checkpoint.inspect_command import human_bytes
from tests.unit.checkpoint.models import two_layers
from tests.unit.checkpoint.ranks import Brought, flip, save_on_ranks, whole


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    optimizer = {"scalars": {}, "groups": [{"lr": 0.5, "betas": (0.9, 0.99)}]}
    state = {"global_steps": 7, "zero_stage": 2, "loss_scale": {"scale": 4.0}, "client": {"epoch": 1}}
    pieces = [whole(kind, name, t) for kind in ("weight", "optimizer.exp_avg") for name, t in two_layers().items()]
    save_on_ranks(tmp_path, "global_step7", [Brought(pieces, shared_state={**state, "optimizer": optimizer})])
    return tmp_path


def test_lines_tell_what_is_in_it(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(saved)]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == str(saved / "global_step7")
    for line in (
        "tag  global_step7 (the latest)",
        "saved by  1 rank",
        "global steps  7",
        "zero stage  2",
        "parameters  170",
        "optimizer  exp_avg; lr 0.5, betas [0.9, 0.99]",
        "loss scale  scale 4.0",
        "client state  epoch",
        "weight  4  170  680 bytes  F32",
    ):
        assert line in lines
    assert not any(line.startswith("weight  embed.weight") for line in lines)
    assert cli.main(["inspect", str(saved), "--tensors"]) == 0
    assert "weight  embed.weight  11 x 6  F32  1" in capsys.readouterr().out


def test_a_terminal_gets_tables(saved: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    console = inspect_command.Console
    monkeypatch.setattr(
        inspect_command, "Console", lambda **kw: console(**kw, force_terminal=True, width=100, color_system=None)
    )
    assert cli.main(["inspect", str(saved), "--verify"]) == 0
    text = capsys.readouterr().out
    assert "│" in text
    assert "every block of every file is as it was written" in text


def test_damage_is_named_and_is_exit_code_1(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(saved), "--verify"]) == 0
    assert "every block of every file is as it was written" in capsys.readouterr().out
    flip(saved / "global_step7" / "rank-00000.safetensors", 4096 + 3)
    assert cli.main(["inspect", str(saved)]) == 0  # not looked for
    capsys.readouterr()
    assert cli.main(["inspect", str(saved), "--verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["damage"]
    assert [(item["file"], item["tensor"]) for item in found] == [("rank-00000.safetensors", "weight of embed.weight")]
    assert cli.main(["inspect", str(saved), "--verify"]) == 1
    assert "rank-00000.safetensors  weight of embed.weight" in capsys.readouterr().out
    flip(saved / "global_step7" / "index.json", 300)
    assert cli.main(["inspect", str(saved)]) == 1
    assert "index.json is damaged" in capsys.readouterr().err


def test_json_has_all_of_it(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tag"], found["num_parameters"], found["progress"]["global_steps"]) == ("global_step7", 170, 7)
    assert "tensors" not in found
    assert cli.main(["inspect", str(saved), "--json", "--tensors"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tensors"]) == 8 + 1  # and the rank's own state


def test_what_is_not_there_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["inspect", str(tmp_path / "file")]) == 2
    assert "file is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(12, "12 bytes"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3 * 10**12, "3.0 TB")]
)
def test_sizes_are_short(num_bytes, text) -> None:
    assert human_bytes(num_bytes) == text
