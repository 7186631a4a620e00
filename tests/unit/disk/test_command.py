"""`craken io` as typed: a table and a section to copy, or one message and code 2."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from craken import cli
from craken.disk.command import parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("8MiB", 8 << 20), ("8M", 8 << 20), ("1 gib", 1 << 30), ("512KB", 512 << 10), ("7B", 7)],
)
def test_sizes_are_read_as_people_write_them(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5GiB", "8Mb/s", "GiB", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 8MiB"):
        parse_bytes(text)


def test_the_disk_is_measured_and_a_section_recommended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["io", "--folder", str(tmp_path), "--size", "1MiB", "--block", "64KiB"]) == 0
    text = capsys.readouterr().out
    assert str(tmp_path) in text
    assert len(re.findall(r"^craken\b", text, re.MULTILINE)) == 12
    assert len(re.findall(r"^craken <-", text, re.MULTILINE)) == 1
    assert "plain loop" in text
    found = re.search(r'"aio": (\{.*\})', text)
    assert found is not None
    section = json.loads(found[1])
    assert section["block_size"] == 64 << 10
    assert set(section) == {"block_size", "queue_depth", "intra_op_parallelism"}
    assert list(tmp_path.iterdir()) == []


def test_the_recommended_section_is_one_that_configs_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "64KiB", "--block", "4KiB", "--queue-depth", "2", "--threads", "3"]
    assert cli.main(["io", "--folder", str(tmp_path), *words]) == 0
    section = capsys.readouterr().out.partition("for the config file: ")[2]
    config = tmp_path / "ds.json"
    config.write_text(f'{{"train_batch_size": 1, {section}}}')
    assert cli.main(["config", str(config)]) == 0
    assert '"queue_depth": 2, "intra_op_parallelism": 3' in section


def test_one_direction_shows_one_direction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["io", "--folder", str(tmp_path), "--size", "64KiB", "--queue-depth", "1", "--threads", "1", "--read"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "read GB/s" in text
    assert "write GB/s" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folder", "/nowhere/at/all"], "--folder: expected an existing folder, got /nowhere/at/all; make it first"),
        (["--size", "1000000TiB"], "bytes free, expected 1,099,511,627,776,000,000: free some space there"),
        (["--folder", "/proc/self"], "cannot swap to /proc/self"),
    ],
)
def test_a_folder_that_will_not_do_is_one_message_and_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["io", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("words", [["--size", "big"], ["--threads", "0"], ["--queue-depth", "x"], ["--depth", "1"]])
def test_wrong_flags_are_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["io", *words])
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err
