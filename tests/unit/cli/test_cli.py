"""The `craken` command and the scripts under their old names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from craken import cli
from craken.version import __version__


def _write(folder: Path, config: dict[str, object]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"craken {__version__}\n")


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "launch", "config", "doctor"))


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["trian"])
    assert stop.value.code == 2
    assert "'trian'" in capsys.readouterr().err


def test_config_shows_the_batch_triple(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", _write(tmp_path, {"train_batch_size": 32}), "--world-size", "4"]) == 0
    assert "train_batch_size 32 = train_micro_batch_size_per_gpu 8 x" in capsys.readouterr().out


def test_config_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", _write(tmp_path, {"train_batch_sizee": 32})]) == 2
    assert "train_batch_sizee" in capsys.readouterr().err
    assert cli.main(["config", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_the_launcher_goes_by_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    for call, name in ((cli.deepspeed, "deepspeed"), (lambda words: cli.main(["launch", *words]), "craken launch")):
        with pytest.raises(SystemExit):
            call(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} [flags] script.py")


def test_the_launcher_refuses_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.deepspeed(["--num_gpus=0", "train.py"]) == 2
    assert "--num_gpus: expected at least 1" in capsys.readouterr().err
