"""Saving: all ranks or none, and what was there before stays until the new one is whole."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from craken.checkpoint import Piece, Reader, save, verify
from craken.checkpoint import folder as folders
from craken.comm import MeshAxis
from tests.unit.checkpoint.ranks import (
    ONE_RANK,
    Brought,
    names,
    numbers,
    run_ranks_as_threads,
    save_on_ranks,
    save_one,
    shard,
    whole,
)


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Make every longer write of this process fail, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_ranks_write_one_file_each_and_one_index(tmp_path: Path) -> None:
    w, b = numbers(4, 5), numbers(3)
    brought = [
        Brought([shard("master", "w", w, 0, 7), whole("param", "b", b)], {"rank": 0}, {"step": 3}),
        Brought([shard("master", "w", w, 7, 20), whole("param", "b", b)], {"rank": 1}, {"step": 4}),
    ]
    paths = save_on_ranks(tmp_path, "global_step3", brought)
    assert paths == [tmp_path / "global_step3"] * 2
    assert names(tmp_path) == ["global_step3", "latest"]
    assert names(paths[0]) == ["index.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    reader = Reader(tmp_path)
    assert (reader.tag, reader.world_size, reader.shared_state) == ("global_step3", 2, {"step": 3})
    assert [reader.rank_state(rank) for rank in (0, 1)] == [{"rank": 0}, {"rank": 1}]
    assert torch.equal(reader.read_full("master", "w"), w)
    assert torch.equal(reader.read_full("param", "b"), b)
    assert verify(paths[0]) == []


def test_a_tensor_that_all_ranks_hold_is_stored_once(tmp_path: Path) -> None:
    pieces = [whole("param", f"w{i}", numbers(1000, seed=i)) for i in range(4)]
    save_on_ranks(tmp_path, "a", [Brought(pieces), Brought(pieces)])
    sizes = [(tmp_path / "a" / f"rank-0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 4096 + 2 * 4000 + 100
    assert all(torch.equal(Reader(tmp_path).read_full("param", f"w{i}"), pieces[i].tensor) for i in range(4))


def test_saving_again_under_a_tag_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        save_one(tmp_path, "pytorch_model", {"w": torch.full((4,), value)})
        assert Reader(tmp_path).read_full("param", "w").tolist() == [value] * 4
    assert names(tmp_path) == ["latest", "pytorch_model"]


def test_latest_stays_when_asked_to(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {"w": torch.zeros(1)})
    save_one(tmp_path, "b", {"w": torch.ones(1)}, save_latest=False)
    assert Reader(tmp_path).tag == "a"
    assert Reader(tmp_path, "b").tag == "b"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Brought(rank_state={"a": [object()]}), r"rank 1: ValueError: state at rank_state\.a\[0\]: cannot store"),
        (Brought([shard("param", "x", numbers(8), 0, 4)]), r"param of x: nobody holds elements \[4, 8\)"),
        (Brought([Piece("rank_state", whole("p", "x", numbers(1)).spec, numbers(1))]), "'rank_state' is taken"),
        (Brought(tag="other"), "expected one tag on all ranks"),
        (Brought(tag="../up"), r"rank 1: ValueError: tag '\.\./up'"),
    ],
)
def test_wrong_input_on_one_rank_is_raised_on_all_before_anything_is_written(
    tmp_path: Path, bad: Brought, message: str
) -> None:
    good = Brought([whole("param", "w", numbers(3))])
    errors = save_on_ranks(tmp_path / "folder", "a", [good, bad])
    assert [type(error) for error in errors] == [ValueError, ValueError]
    assert str(errors[0]) == str(errors[1])
    with pytest.raises(ValueError, match=message):
        raise errors[0]
    assert not (tmp_path / "folder").exists()


def test_pieces_are_taken_from_an_iterator_and_its_failure_reaches_all_ranks(tmp_path: Path) -> None:
    def pieces(rank: int) -> Iterator[Piece]:
        yield whole("param", "w", numbers(3))
        if rank == 1:
            raise RuntimeError("the shard is gone")

    def on_rank(rank: int) -> Path:
        axis = MeshAxis("dp", None, rank, 2)
        return save(tmp_path / "f", "a", pieces=pieces(rank), axis=axis, rank_state={}, shared_state={})

    errors = run_ranks_as_threads(on_rank, 2)
    assert [type(error) for error in errors] == [RuntimeError, RuntimeError]
    assert "failed on 1 of 2 ranks: rank 1: RuntimeError: the shard is gone" in str(errors[0])


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {"w": torch.ones(100)})
    with (
        files_limited_to(1 << 20),
        pytest.raises(OSError, match=r"saving.*failed on 1 of 1 ranks: rank 0: OSError.*File too large"),
    ):
        save_one(tmp_path, "b", {"w": torch.ones(1 << 20)})
    assert names(tmp_path) == ["a", "latest"]
    assert verify(tmp_path / "a") == []
    assert Reader(tmp_path).tag == "a"


def test_a_full_disk_while_replacing_keeps_the_old(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {"w": torch.ones(100)})
    with files_limited_to(1 << 20), pytest.raises(OSError, match="File too large"):
        save_one(tmp_path, "a", {"w": torch.ones(1 << 20)})
    assert names(tmp_path) == ["a", "latest"]
    assert Reader(tmp_path).read_full("param", "w").tolist() == [1.0] * 100


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_saving_works_where_files_live_in_memory() -> None:
    folder = Path("/dev/shm") / f"craken-test-{os.getpid()}"
    try:
        for value in (1.0, 2.0):
            save_one(folder, "a", {"w": torch.full((4,), value)})
        assert Reader(folder).read_full("param", "w").tolist() == [2.0] * 4
    finally:
        shutil.rmtree(folder)


def test_one_rank_that_cannot_write_fails_all_with_its_number_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [whole("param", "w", numbers(3))]
    save_on_ranks(tmp_path, "a", [Brought(pieces), Brought(pieces)])
    real = os.open

    def refuse(path: object, *args: int, **options: int) -> int:
        if str(path).endswith("rank-00001.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    errors = save_on_ranks(tmp_path, "b", [Brought(pieces), Brought(pieces)])
    monkeypatch.undo()
    assert [type(error) for error in errors] == [OSError, OSError]
    assert "failed on 1 of 2 ranks: rank 1: PermissionError" in str(errors[0])
    assert names(tmp_path) == ["a", "latest"]
    assert Reader(tmp_path).tag == "a"


def test_a_folder_that_other_ranks_cannot_see_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = folders.stage

    def vanish(folder: Path, tag: str) -> folders.Staging:
        staging = real(folder, tag)
        staging.path.rmdir()
        return staging

    monkeypatch.setattr(folders, "stage", vanish)
    errors = save_on_ranks(tmp_path, "a", [Brought(), Brought()])
    assert "ranks: rank 0, 1: FileNotFoundError" in str(errors[0])
    assert "save to storage that all ranks share" in str(errors[0])


def test_an_interrupt_removes_the_unfinished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    save_one(tmp_path, "a", {"w": torch.ones(1)})
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_one(tmp_path, "b", {"w": torch.ones(1)})
    monkeypatch.undo()
    assert names(tmp_path) == ["a", "latest"]


def test_a_failure_to_move_latest_leaves_both_checkpoints_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, tag: str) -> None:
        raise OSError("disk full")

    save_one(tmp_path, "a", {"w": torch.ones(1)})
    monkeypatch.setattr(folders, "move_latest", full)
    with pytest.raises(OSError, match="disk full"):
        save_one(tmp_path, "b", {"w": torch.ones(1)})
    assert Reader(tmp_path).tag == "a"
    assert verify(tmp_path / "a") == verify(tmp_path / "b") == []


def test_everything_is_on_the_disk_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(fd: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{fd}')).name.split('.tmp-')[0]}")
        real_sync(fd)

    def rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name.split('.tmp-')[0]} {target.name}")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    save_one(tmp_path, "t", {"w": torch.ones(1)})
    folder = f"sync {tmp_path.name}"
    expected = [
        "sync rank-00000.safetensors",
        "sync index.json",
        "sync .t",
        "rename .t t",
        folder,
        "sync .latest",
        folder,
    ]
    assert events == expected


def test_an_empty_checkpoint_is_one(tmp_path: Path) -> None:
    path = save(tmp_path, "a", pieces=[], axis=ONE_RANK, rank_state={}, shared_state={})
    reader = Reader(tmp_path)
    assert (reader.kinds(), reader.shared_state, reader.rank_state(0), verify(path)) == ([], {}, {}, [])
