"""Old checkpoints go, in order of saving; what is damaged takes no place, what `latest` names stays."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from craken.checkpoint import Reader, list_tags, newest_first, newest_whole, verify
from craken.checkpoint import folder as folders
from craken.checkpoint.retention import delete_older
from tests.unit.checkpoint.ranks import Brought, flip, names, numbers, save_on_ranks, save_one, whole

W = {"w": torch.ones(100)}


def test_each_save_leaves_the_newest_and_no_leftovers(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_one(tmp_path, f"step{step}", W, keep_last=2)
    assert names(tmp_path) == ["latest", "step4", "step5"]
    assert verify(tmp_path / "step4") == verify(tmp_path / "step5") == []
    assert Reader(tmp_path).tag == "step5"


def test_without_a_number_all_stay(tmp_path: Path) -> None:
    for step in range(1, 4):
        save_one(tmp_path, f"step{step}", W)
    assert newest_first(tmp_path) == ["step3", "step2", "step1"]


def test_age_is_the_time_of_saving_whatever_the_names(tmp_path: Path) -> None:
    for tag in ("step900", "zebra", "step30", "apple"):  # as after going back to step 20
        save_one(tmp_path, tag, W, keep_last=3)
    assert newest_first(tmp_path) == ["apple", "step30", "zebra"]


def test_copies_that_keep_times_keep_the_order_and_equal_times_go_by_number(tmp_path: Path) -> None:
    for tag in ("b", "a", "c"):
        save_one(tmp_path / "first", tag, W)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert newest_first(tmp_path / "copy") == ["c", "a", "b"]
    for step in (9, 10, 11):
        save_one(tmp_path / "equal", f"step{step}", W)
        os.utime(tmp_path / "equal" / f"step{step}" / "index.json", (1e9, 1e9))
    assert newest_first(tmp_path / "equal") == ["step11", "step10", "step9"]


def test_saving_again_under_a_tag_makes_it_young(tmp_path: Path) -> None:
    for tag in ("a", "b", "a", "c"):
        save_one(tmp_path, tag, W, keep_last=2)
    assert newest_first(tmp_path) == ["c", "a"]


@pytest.mark.parametrize("how", ["a short file", "a missing file", "a flipped index"])
def test_a_damaged_one_takes_no_place_and_goes_when_it_is_old(tmp_path: Path, how: str) -> None:
    for tag in ("a", "b", "c"):
        save_one(tmp_path, tag, W)
    file = tmp_path / "c" / "rank-00000.safetensors"
    if how == "a short file":
        os.truncate(file, 10)
    elif how == "a missing file":
        file.unlink()
    else:
        flip(tmp_path / "c" / "index.json", 200)
    save_one(tmp_path, "d", W, keep_last=2)
    assert newest_first(tmp_path) == ["d", "c", "b"]  # c is younger than b, which is kept
    save_one(tmp_path, "e", W, keep_last=2)
    save_one(tmp_path, "f", W, keep_last=2)
    assert newest_first(tmp_path) == ["f", "e"]


@pytest.mark.parametrize("moment", ["find", "delete_tag"])
def test_what_another_process_deletes_meanwhile_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    for tag in ("a", "b", "c"):
        save_one(tmp_path, tag, W)
    real = getattr(folders, moment)

    def gone(*words: Any) -> Any:
        if words[-1] in ("a", tmp_path / "a"):
            shutil.rmtree(tmp_path / "a", ignore_errors=True)
        return real(*words)

    monkeypatch.setattr(folders, moment, gone)
    assert save_one(tmp_path, "d", W, keep_last=3) == tmp_path / "d"
    assert newest_first(tmp_path) == ["d", "c", "b"]
    assert not caplog.records


def test_a_folder_that_cannot_be_listed_any_more_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path) -> list[str]:
        raise PermissionError("permission denied")

    monkeypatch.setattr("craken.checkpoint.retention.newest_first", refuse)
    save_one(tmp_path, "a", W, keep_last=1)
    assert Reader(tmp_path).tag == "a"
    assert f"cannot look for old checkpoints in {tmp_path} (permission denied)" in caplog.text


def test_what_latest_names_stays(tmp_path: Path) -> None:
    save_one(tmp_path, "good", W)
    for step in range(4):
        save_one(tmp_path, f"trial{step}", W, save_latest=False, keep_last=2)
    assert newest_first(tmp_path) == ["trial3", "trial2", "good"]
    assert Reader(tmp_path).tag == "good"


def test_other_folders_newer_formats_and_one_being_written_stay(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    save_one(tmp_path, "newer", W)
    index = tmp_path / "newer" / "index.json"
    index.write_text(index.read_text().replace('"version": 1', '"version": 99'))
    other = folders.stage(tmp_path, "being_written")
    for step in range(3):
        save_one(tmp_path, f"step{step}", W, keep_last=1)
    assert names(tmp_path) == [other.path.name, "latest", "newer", "notes", "step2"]
    folders.discard(other)


def test_a_deletion_cut_short_leaves_no_half_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(3):
        save_one(tmp_path, f"step{step}", W)

    def killed(path: Path, **_: object) -> None:
        (path / "index.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_older(tmp_path, keep_last=1)
    monkeypatch.undo()
    assert list_tags(tmp_path) == ["step0", "step2"]
    save_one(tmp_path, "step3", W)
    assert names(tmp_path) == ["latest", "step0", "step2", "step3"]


def test_what_cannot_be_deleted_is_said_and_the_save_has_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    save_one(tmp_path, "a", W)
    monkeypatch.setattr(folders, "delete_tag", refuse)
    save_one(tmp_path, "b", W, keep_last=1)
    assert newest_first(tmp_path) == ["b", "a"]
    assert f"cannot delete the old checkpoint {tmp_path / 'a'}" in capsys.readouterr().err


def test_one_rank_deletes_for_all(tmp_path: Path) -> None:
    pieces = [whole("param", "w", numbers(3))]
    for step in range(3):
        save_on_ranks(tmp_path, f"step{step}", [Brought(pieces), Brought(pieces)], keep_last=1)
    assert names(tmp_path) == ["latest", "step2"]


def test_none_at_all_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_last: expected at least 1 \(None keeps all checkpoints\), got 0"):
        save_one(tmp_path / "folder", "a", W, keep_last=0)
    assert not (tmp_path / "folder").exists()


def test_the_newest_whole_one_is_found_and_those_passed_over_are_named(tmp_path: Path) -> None:
    assert newest_whole(tmp_path / "nowhere") == (None, {})
    for tag in ("a", "b", "c", "d"):
        save_one(tmp_path, tag, W)
    flip(tmp_path / "d" / "rank-00000.safetensors", 4096 + 17)
    (tmp_path / "c" / "rank-00000.safetensors").unlink()
    found = newest_whole(tmp_path)
    assert (found.tag, [*found.damaged]) == ("b", ["d", "c"])
    assert "param of w" in found.damaged["d"]
    assert "is missing" in found.damaged["c"]
