"""Folders appear whole or not at all, whichever way the system lets us swap them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from craken.checkpoint import folder as folders
from craken.checkpoint.errors import CheckpointNotFound
from craken.checkpoint.folder import check_tag, discard, find, list_tags, move_latest, publish, stage

TOKEN = "0123456789abcdef"


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of replacing a checkpoint."""
    if request.param == "renames":
        monkeypatch.setattr(folders, "_renameat2", None)
    elif folders._renameat2 is None:
        pytest.skip("no renameat2 on this system")
    return request.param


def make(folder: Path, name: str, content: str = "") -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "index.json").write_text(content)
    return folder / name


def put(folder: Path, tag: str, content: str) -> None:
    staging = stage(folder, tag)
    (staging.path / "index.json").write_text(content)
    publish(staging)
    discard(staging)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_tag_and_its_replacement_leave_nothing_else(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "not" / "yet"
    put(folder, "a", "1")
    put(folder, "a", "2")
    assert names(folder) == ["a"]
    assert (folder / "a" / "index.json").read_text() == "2"


def test_an_empty_folder_with_the_name_is_taken_over(tmp_path: Path, way: str) -> None:
    (tmp_path / "a").mkdir()
    put(tmp_path, "a", "1")
    assert find(tmp_path, "a") == ("a", tmp_path / "a")


@pytest.mark.parametrize("can_link", [True, False])
def test_what_others_put_into_a_checkpoint_stays_when_it_is_replaced(
    tmp_path: Path, way: str, can_link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object, **options: object) -> None:
        raise OSError("no second names here")

    if not can_link:
        monkeypatch.setattr(os, "link", refuse)
    put(tmp_path, "a", "1")
    old = tmp_path / "a"
    (old / "rank-00007.safetensors").write_text("of a rank that is no more")
    (old / "notes.txt").write_text("mine")
    (old / "plots" / "loss").mkdir(parents=True)
    (old / "plots" / "loss" / "1.csv").write_text("2.5")
    (old / "link").symlink_to("nowhere")
    for content in ("2", "3"):
        put(tmp_path, "a", content)
        assert names(tmp_path / "a") == ["index.json", "link", "notes.txt", "plots"]
        assert [(old / name).read_text() for name in ("notes.txt", "plots/loss/1.csv")] == ["mine", "2.5"]
        assert (old / "link").readlink() == Path("nowhere")
        assert (old / "index.json").read_text() == content
    assert names(tmp_path) == ["a"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="it is no checkpoint of ours; remove it"):
        stage(tmp_path, "a")
    assert names(tmp_path) == ["a"]


def test_between_two_renames_readers_find_the_checkpoint_set_aside(tmp_path: Path) -> None:
    make(tmp_path, f".a.old-{TOKEN}", "old")
    make(tmp_path, f".a.tmp-{TOKEN}", "new")
    move_latest(tmp_path, "a")
    assert list_tags(tmp_path) == ["a"]
    assert find(tmp_path, None) == ("a", tmp_path / f".a.old-{TOKEN}")


def test_the_next_save_puts_back_what_was_set_aside_and_deletes_leftovers(tmp_path: Path) -> None:
    make(tmp_path, f".a.old-{TOKEN}", "old a")
    make(tmp_path, f".a.tmp-{TOKEN}", "new a")
    make(tmp_path, "b", "new b")
    make(tmp_path, f".b.old-{TOKEN}", "old b")
    (tmp_path / f".latest.tmp-{TOKEN}").write_text("a")
    put(tmp_path, "c", "c")
    assert names(tmp_path) == ["a", "b", "c"]
    assert (tmp_path / "a" / "index.json").read_text() == "old a"
    assert (tmp_path / "b" / "index.json").read_text() == "new b"


def test_a_failed_rename_puts_the_old_checkpoint_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_renameat2", None)
    put(tmp_path, "a", "1")
    staging = stage(tmp_path, "a")
    rename, calls = Path.rename, []

    def fail_second(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="disk on fire"):
        publish(staging)
    discard(staging)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "index.json").read_text() == "1"


def test_the_folder_of_a_living_saver_is_left_alone(tmp_path: Path) -> None:
    living = stage(tmp_path, "a")
    put(tmp_path, "b", "b")
    assert living.path.is_dir()
    discard(living)
    assert names(tmp_path) == ["b"]


def test_folders_that_cannot_be_locked_are_still_saved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    put(tmp_path, "a", "1")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("tag", ["", ".", "..", ".hidden", "a/b", "/", "a\nb", "latest", "a/"])
def test_a_tag_that_is_no_folder_name_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="expected one folder name"):
        check_tag(tag)


def test_tags_are_listed_with_numbers_in_order(tmp_path: Path) -> None:
    for name in ("global_step100", "global_step20", "pytorch_model", "7", "x1y"):
        make(tmp_path, name)
    (tmp_path / "runs").mkdir()
    make(tmp_path, ".hidden")
    assert list_tags(tmp_path) == ["7", "global_step20", "global_step100", "pytorch_model", "x1y"]


def test_what_is_missing_is_said_and_what_exists_listed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match=r"nowhere does not exist"):
        find(tmp_path / "nowhere", None)
    with pytest.raises(CheckpointNotFound, match=r"latest does not exist.*no checkpoint exists in it"):
        find(tmp_path, None)
    make(tmp_path, "global_step5")
    make(tmp_path, "global_step10")
    with pytest.raises(CheckpointNotFound, match=r"latest does not exist.*: global_step5, global_step10"):
        find(tmp_path, None)
    with pytest.raises(CheckpointNotFound, match=r"tag 'global_step7' does not exist.*: global_step5, global_step10"):
        find(tmp_path, "global_step7")
    (tmp_path / "latest").write_text("global_step9\n")
    with pytest.raises(CheckpointNotFound, match=r"latest names the tag 'global_step9', which does not exist; tags"):
        find(tmp_path, None)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointNotFound, match=r"latest is damaged"):
        find(tmp_path, None)
    (tmp_path / "global_step6").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"global_step6 holds no index.json"):
        find(tmp_path, "global_step6")


def test_latest_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move_latest(tmp_path, "a")
    assert (tmp_path / "latest").read_text() == "a\n"

    def full(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        move_latest(tmp_path, "b")
    assert names(tmp_path) == ["latest"]
    assert (tmp_path / "latest").read_text() == "a\n"
