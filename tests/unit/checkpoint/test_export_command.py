"""`craken export`: what is typed and what is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from craken import cli
from craken.checkpoint.export import command as export_command
from craken.checkpoint.export import fp32
from tests.unit.checkpoint.models import save_model, two_layers, write_json
from tests.unit.checkpoint.ranks import flip


def test_a_checkpoint_is_exported_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_model(tmp_path / "saved", two_layers())
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "saved"), str(out), "--dtype", "bf16", "--tag", "global_step1"]) == 0
    captured = capsys.readouterr()
    assert f"{out}: 4 tensors, 340 bytes in 1 file, torch.bfloat16, from {path}" in captured.out
    assert "no config.json was found" in captured.err
    assert load_file(out / "model.safetensors")["embed.weight"].dtype == torch.bfloat16
    write_json(tmp_path / "files" / "config.json", {})
    words = [
        "export",
        str(path),
        str(tmp_path / "two"),
        "--max-shard-size",
        "300B",
        "--model-files",
        str(tmp_path / "files"),
    ]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert "in 3 files, torch.float32" in captured.out
    assert f"configuration from {tmp_path / 'files'}" in captured.out
    assert not captured.err


def test_what_cannot_be_done_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "saved", two_layers())
    saved = str(tmp_path / "saved")
    for words, message in (
        ([str(tmp_path / "nowhere"), str(tmp_path / "out")], "nowhere does not exist"),
        ([saved, saved], "is not empty; expected a new or an empty folder"),
        ([saved, str(tmp_path / "out"), "--tag", "x"], "tag 'x' does not exist"),
        ([saved, str(tmp_path / "out"), "--merge-adapter", saved], "holds no adapter_config.json"),
        ([saved, str(tmp_path / "out"), "--model-files", saved], "expected a folder that holds config.json"),
        ([saved, str(tmp_path / "out"), "--quantise", "int8"], "give --model-files"),
    ):
        assert cli.main(["export", *words]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        cli.main(["export", saved, str(tmp_path / "out"), "--max-shard-size", "many"])
    assert "expected a size such as 5GB" in capsys.readouterr().err


def test_damage_is_exit_code_one_as_in_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_model(tmp_path / "saved", two_layers())
    flip(path / "rank-00001.safetensors", 4096)
    for command in (["inspect", "--verify"], ["export"]):
        words = [command[0], str(path), *([str(tmp_path / "out")] if command[0] == "export" else command[1:])]
        assert cli.main(words) == 1, words
    assert "rank-00001.safetensors: weight of embed.weight, bytes" in capsys.readouterr().err
    assert fp32.main([str(path), str(tmp_path / "out")]) == 1
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupted_run_is_to_be_finished_for_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "run" / "checkpoints", two_layers())
    write_json(tmp_path / "run" / "run.json", {})
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "no config.json was found" in told
    assert f"finish the run, which writes one (craken train --resume {tmp_path / 'run'}), or give --model-files" in told


def test_a_terminal_sees_progress(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "saved", two_layers())
    console = export_command.Console
    monkeypatch.setattr(export_command, "Console", lambda **kw: console(**kw, force_terminal=True, width=100))
    assert cli.main(["export", str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    assert "exporting" in capsys.readouterr().err
