"""Checkpoints in a store without renames: what readers see at any moment is a whole one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from craken.checkpoint import CheckpointDamaged, CheckpointNotFound, Reader, list_tags, newest_whole, verify
from craken.checkpoint.export.command import main as export
from craken.checkpoint.export.fp32 import get_fp32_state_dict_from_zero_checkpoint
from craken.checkpoint.export.fp32 import main as convert
from craken.checkpoint.inspect_command import main as inspect
from craken.checkpoint.original.command import main as import_checkpoint
from craken.checkpoint.place import Url, place_of
from craken.checkpoint.retention import delete_older
from craken.spec import ShardSpec
from craken.train.command import main as train
from tests.unit.checkpoint.ranks import Brought, numbers, save_on_ranks, save_one, shard, whole

STORE = fsspec.filesystem("memory")


@pytest.fixture
def url() -> Iterator[str]:
    """A prefix in a store that this process alone sees."""
    yield "memory://bucket/run"
    if STORE.exists("/bucket"):
        STORE.rm("/bucket", recursive=True)


def names(path: str = "/bucket/run") -> list[str]:
    """All files, with the save's own token left out."""
    files = (name.removeprefix(f"{path}/") for name in STORE.find(path))
    return sorted(f"{name[:-29]}.safetensors" if name.endswith(".safetensors") else name for name in files)


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("runs/a", Path("runs/a")),
        ("file:///runs/a", Path("/runs/a")),
        ("local:///runs/a/", Path("/runs/a")),
        ("s3://bucket/run/", Url("s3://bucket/run")),
        (Path("x"), Path("x")),
        (Url("gs://b/c"), Url("gs://b/c")),
    ],
)
def test_a_url_is_told_from_a_path(folder: Any, place: Any) -> None:
    assert place_of(folder) == place


def test_two_ranks_save_to_a_url_and_any_range_is_read_back(url: str) -> None:
    w, b = numbers(40, 5), numbers(3)
    brought = [
        Brought([shard("weight", "w", w, 0, 70), whole("param", "b", b)], {"rank": 0}, {"step": 3}),
        Brought([shard("weight", "w", w, 70, 200), whole("param", "b", b)], {"rank": 1}),
    ]
    paths = save_on_ranks(url, "global_step3", brought)
    assert [str(path) for path in paths] == [f"{url}/global_step3"] * 2
    files = ["index.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    assert names() == [f"global_step3/{name}" for name in files] + ["latest"]
    reader = Reader(url)
    assert (reader.tag, reader.world_size, reader.shared_state) == ("global_step3", 2, {"step": 3})
    assert [reader.rank_state(rank) for rank in (0, 1)] == [{"rank": 0}, {"rank": 1}]
    out = torch.empty(90)
    reader.read("weight", ShardSpec("w", (40, 5), 30, 90), out)
    assert torch.equal(out, w.reshape(-1)[30:120])
    assert verify(f"{url}/global_step3") == []


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each request for a part of a file."""
    sizes, real = [], type(STORE).cat_file

    def count(store: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        data = real(store, path, start, end, **options)
        if start is not None:
            sizes.append(len(data))
        return data

    monkeypatch.setattr(type(STORE), "cat_file", count)
    return sizes


def test_only_the_bytes_needed_are_fetched(url: str, monkeypatch: pytest.MonkeyPatch, fetched: list[int]) -> None:
    for module in ("shard_file", "saver"):
        monkeypatch.setattr(f"craken.checkpoint.{module}.BLOCK_BYTES", 64)
    monkeypatch.setattr("craken.checkpoint.read_ahead.WINDOW_BYTES", 64)  # a block is more than a small range of that
    save_one(url, "a", {"w": numbers(160)})
    Reader(url).read("param", ShardSpec("w", (160,), 30, 20), torch.empty(20))
    assert fetched == [64] * 3


def test_small_tensors_come_by_the_window(url: str, fetched: list[int]) -> None:
    weights, others = ({f"layer{i}": numbers(16, seed=i) for i in range(500 * k, 500 * (k + 1))} for k in (0, 1))
    large = numbers(300_000)
    brought = [Brought([whole("param", name, tensor) for name, tensor in part.items()]) for part in (weights, others)]
    brought[0].pieces.append(whole("param", "large", large))
    brought[0].shared_state = {"steps": {name: torch.tensor(float(i)) for i, name in enumerate(weights)}}
    save_on_ranks(url, "a", brought)
    reader = Reader(url)
    for pair in zip(weights, others, strict=True):  # from two files by turns
        for name in pair:
            assert torch.equal(reader.read_full("param", name), (weights | others)[name])
    assert reader.shared_state["steps"]["layer499"] == 499
    assert torch.equal(reader.read_full("param", "large"), large)
    assert len(fetched) <= 6, "1,500 small tensors in two files"
    del fetched[:]
    assert verify(f"{url}/a") == []
    assert len(fetched) <= 6


def test_saving_again_under_a_tag_replaces_it_and_leaves_nothing(url: str) -> None:
    for value in (1.0, 2.0):
        save_one(url, "pytorch_model", {"w": torch.full((4,), value)})
        assert Reader(url).read_full("param", "w").tolist() == [value] * 4
    assert names() == ["latest", "pytorch_model/index.json", "pytorch_model/rank-00000.safetensors"]


@pytest.mark.parametrize("name", ["rank-00000", "rank-00001", "index", "index.json"])
@pytest.mark.parametrize("tag", ["kept", "new"])
def test_a_store_that_refuses_any_file_leaves_the_checkpoints_before(
    url: str, monkeypatch: pytest.MonkeyPatch, tag: str, name: str
) -> None:
    w = numbers(50)
    save_on_ranks(url, "kept", [Brought([whole("param", "w", w)]), Brought()])
    before = names()
    refuse(monkeypatch, f"/{tag}/{name}")
    errors = save_on_ranks(url, tag, [Brought([whole("param", "w", w + 1)]), Brought()])
    monkeypatch.undo()
    assert [type(error) for error in errors] == [OSError, OSError]
    assert "out of quota" in str(errors[0])
    assert names() == before
    assert torch.equal(Reader(url).read_full("param", "w"), w)
    assert verify(f"{url}/kept") == []


def refuse(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Let the store fail when a file whose name has `path` in it ends."""

    def failing(name: str) -> Any:
        real = getattr(type(STORE), name)

        def call(store: Any, file: str, *args: Any, **options: Any) -> Any:
            if path in file and "rb" not in args:
                raise OSError("out of quota")
            return real(store, file, *args, **options)

        return call

    for name in ("pipe_file", "open"):
        monkeypatch.setattr(type(STORE), name, failing(name))


def test_a_killed_saver_s_files_are_no_checkpoint_and_go_with_the_next(url: str) -> None:
    save_one(url, "a", {"w": torch.ones(2)})
    for file in ("b/rank-00000-0123456789abcdef.safetensors", "a/rank-00000-0123456789abcdef.safetensors"):
        STORE.pipe_file(f"/bucket/run/{file}", b"half of a fi")
    assert list_tags(url) == ["a"]
    with pytest.raises(CheckpointNotFound, match="tag 'b' does not exist.*: a"):
        Reader(url, "b")
    for tag in ("a", "b"):
        save_one(url, tag, {"w": torch.ones(2)})
        assert verify(f"{url}/{tag}") == []
    assert len(names()) == 5


def test_old_checkpoints_go_and_the_index_of_each_goes_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (9, 10, 11):
        save_one(url, f"step{step}", {"w": torch.full((4,), float(step))}, keep_last=2)
    assert list_tags(url) == ["step10", "step11"]
    assert [name for name in names() if name.startswith("step9/")] == []
    STORE.pipe_file("/bucket/run/step10/note.txt", b"of somebody else's")
    refused = type(STORE).rm_file

    def cut_short(store: Any, file: str) -> None:
        if file.endswith(".safetensors"):
            raise OSError("out of reach")
        refused(store, file)

    monkeypatch.setattr(type(STORE), "rm_file", cut_short)
    save_one(url, "step12", {"w": torch.ones(4)}, keep_last=2)
    monkeypatch.undo()
    assert list_tags(url) == ["step11", "step12"]
    assert [verify(f"{url}/{tag}") for tag in ("step11", "step12")] == [[], []]
    left = ["note.txt", "rank-00000.safetensors"]
    assert [name for name in names() if name.startswith("step10/")] == [f"step10/{name}" for name in left]


@pytest.mark.parametrize("num_done", range(5))
def test_a_deletion_that_is_cut_short_is_finished_by_a_later_one(
    url: str, monkeypatch: pytest.MonkeyPatch, num_done: int
) -> None:
    """Cut short after as many requests: the index, two files, the note; 4: at the end."""
    save_one(url, "a", {"w": torch.ones(4)})
    STORE.pipe_file("/bucket/run/a/rank-00001-0123456789abcdef.safetensors", b"another rank's")
    real, requests = type(STORE).rm_file, []

    def killed(store: Any, path: str) -> None:
        if "/a/" in path or path.endswith(".a.deleting"):
            if len(requests) == num_done:
                raise KeyboardInterrupt
            requests.append(path)
        real(store, path)

    save_one(url, "b", {"w": torch.ones(4)})
    monkeypatch.setattr(type(STORE), "rm_file", killed)
    with pytest.raises(KeyboardInterrupt) if num_done < 4 else contextlib.nullcontext():
        delete_older(place_of(url), keep_last=1)
    monkeypatch.undo()
    assert list_tags(url) == (["a", "b"] if num_done == 0 else ["b"])
    assert all(not verify(f"{url}/{tag}") for tag in list_tags(url))
    if num_done in (1, 2):  # and the tag may be used again in between
        save_one(url, "a", {"w": torch.zeros(4)})
        delete_older(place_of(url), keep_last=2)
        assert verify(f"{url}/a") == []
        assert torch.equal(Reader(url, "a").read_full("param", "w"), torch.zeros(4))
    save_one(url, "c", {"w": torch.ones(4)}, keep_last=1)
    assert names() == ["c/index.json", "c/rank-00000.safetensors", "latest"]


def test_a_note_that_cannot_be_read_stops_no_other_deletion(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    STORE.pipe_file("/bucket/run/.a.deleting", b"no list")
    for tag in "bc":
        save_one(url, tag, {"w": torch.ones(4)}, keep_last=1)
    assert list_tags(url) == ["c"]
    assert "/bucket/run/.a.deleting (" in capfd.readouterr().err


def test_sizes_are_asked_for_of_what_stays_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(5):
        save_one(url, f"step{step}", {"w": torch.ones(4)})
    asked: list[str] = []

    def noting(name: str) -> Any:
        real = getattr(type(STORE), name)

        def call(store: Any, path: str, *args: Any, **options: Any) -> Any:
            asked.append(f"{name} {path}")
            return real(store, path, *args, **options)

        return call

    for name in ("ls", "isfile", "size", "modified", "cat_file", "rm_file"):
        monkeypatch.setattr(type(STORE), name, noting(name))
    delete_older(place_of(url), keep_last=2)
    assert [request.split("/")[3] for request in asked if request.startswith("size")] == ["step4", "step3"]
    for step in (3, 4):  # listed, dated, read
        mine = [request.split()[0] for request in asked if f"step{step}/" in request and "isfile" not in request]
        assert mine == ["modified", "cat_file", "size"]


def test_where_the_store_tells_no_times_numbers_say_which_are_old(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_times(store: Any, path: str) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(type(STORE), "modified", without_times)
    for step in (8, 9, 10):
        save_one(url, f"step{step}", {"w": torch.ones(4)}, keep_last=2)
    assert list_tags(url) == ["step9", "step10"]
    save_one(url, "step3", {"w": torch.ones(4)}, keep_last=2)  # after going back: what `latest` names stays
    assert list_tags(url) == ["step3", "step9", "step10"]


def test_damage_in_a_store_is_named(url: str) -> None:
    save_one(url, "a", {"w": numbers(1000)})
    path = next(path for path in STORE.find("/bucket/run/a") if path.endswith(".safetensors"))
    data = bytearray(STORE.cat_file(path))
    data[-100] ^= 1
    STORE.pipe_file(path, bytes(data))
    with pytest.raises(CheckpointDamaged, match=r"memory://bucket/run/a/rank-00000-\w+\.\w+: param of w, bytes"):
        Reader(url).read_full("param", "w")
    assert [damage.tensor for damage in verify(f"{url}/a")] == ["param of w"]
    STORE.pipe_file(path, bytes(data[:-1]))
    with pytest.raises(CheckpointDamaged, match=r"has \d+ bytes, expected \d+.*param of w"):
        Reader(url)
    STORE.rm_file(path)
    with pytest.raises(CheckpointDamaged, match=r"is missing; it holds 2 .*param of w"):
        Reader(url)


def test_what_is_missing_is_said(url: str) -> None:
    with pytest.raises(CheckpointNotFound, match="memory://bucket/run does not exist"):
        Reader(url)
    save_one(url, "a", {"w": numbers(2)}, save_latest=False)
    with pytest.raises(CheckpointNotFound, match="run/latest does not exist, so a tag must be given; .*: a"):
        Reader(url)
    assert Reader(url, "a").tag == "a"


def test_a_prefix_that_holds_something_else_is_left_alone(url: str) -> None:
    STORE.pipe_file("/bucket/run/data/train.csv", b"1,2,3")
    with pytest.raises(ValueError, match="it is no checkpoint of ours"):
        save_one(url, "data", {"w": numbers(2)})
    assert names() == ["data/train.csv"]


def test_files_of_others_beside_a_checkpoint_stay(url: str) -> None:
    for value in (1.0, 2.0):
        save_one(url, "a", {"w": torch.full((2,), value)})
        STORE.pipe_file("/bucket/run/a/notes.json", b"mine")
    assert names() == ["a/index.json", "a/notes.json", "a/rank-00000.safetensors", "latest"]


def test_a_store_whose_package_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="nosuchstore"):
        Reader("nosuchstore://bucket/run")


def test_commands_and_functions_take_urls(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = numbers(40, 5)
    for step in (9, 10):
        brought = Brought([whole("weight", "w", w + step)], {}, {"global_steps": step, "tied": {}})
        save_on_ranks(url, f"step{step}", [brought])
    for where in (url, f"{url}/", f"{url}/step10"):
        assert inspect([where, "--verify"]) == 0
        shown = capsys.readouterr().out
        assert "tags here  step9, step10" in shown
        assert "step10 (the latest)" in shown
        assert "every block of every file is as it was written" in shown
    assert torch.equal(get_fp32_state_dict_from_zero_checkpoint(url)["w"], w + 10)
    assert torch.equal(get_fp32_state_dict_from_zero_checkpoint(f"{url}/step9")["w"], w + 9)
    assert export([url, str(tmp_path / "model"), "--tag", "step9"]) == 0
    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")["w"], w + 9)
    assert newest_whole(url) == ("step10", {})
    (name,) = (name for name in STORE.find("/bucket/run/step10") if name.endswith(".safetensors"))
    STORE.pipe_file(name, STORE.cat_file(name)[:-1] + b"x")
    assert inspect([url, "--verify"]) == 1
    found = newest_whole(url)
    assert found.tag == "step9"
    assert name.rsplit("/", 1)[-1] in found.damaged["step10"]


def test_only_checkpoints_lie_in_stores(url: str, tmp_path: Path, capsys, caplog) -> None:
    save_one(url, "a", {"w": numbers(4)})
    for run in (
        lambda: export([url, "memory://bucket/model"]),
        lambda: export([url, str(tmp_path / "model"), "--base", "memory://bucket/model"]),
        lambda: convert([url, "memory://bucket/model"]),
        lambda: import_checkpoint(["memory://bucket/original", str(tmp_path / "out")]),
        lambda: import_checkpoint([str(tmp_path), "memory://bucket/out"]),
        lambda: train(["--output", "memory://bucket/out"]),
        lambda: train(["--resume", "auto", "--output", "memory://bucket/out"]),
    ):
        caplog.clear()
        try:
            code = run()
        except SystemExit as ended:
            code = ended.code
        assert code == 2
        said = capsys.readouterr().err + caplog.text
        assert "memory://bucket/" in said
        assert "expected a folder of this host" in said
    assert [path.name for path in tmp_path.iterdir()] == []
