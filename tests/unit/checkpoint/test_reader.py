"""Reading by ranges, from any topology into any other."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from craken.checkpoint import CheckpointDamaged, Reader, Wish, index, place, shard_file
from craken.checkpoint import reader as reader_module
from craken.disk import pages, read_direct, takes_direct_io
from craken.spec import ShardSpec
from tests.unit.checkpoint.ranks import Brought, flip, numbers, save_on_ranks, save_one, shard, whole


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 bytes, so that small tensors have many."""
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 64)
    monkeypatch.setattr("craken.checkpoint.saver.BLOCK_BYTES", 64)


def test_eight_ranks_are_read_back_as_three(tmp_path: Path, small_blocks: None) -> None:
    full = numbers(23, 17)
    bounds = [full.numel() * rank // 8 for rank in range(9)]
    pieces = [[shard("master", "w", full, bounds[rank], bounds[rank + 1])] for rank in range(8)]
    save_on_ranks(tmp_path, "a", [Brought(mine) for mine in pieces])
    reader = Reader(tmp_path)
    for rank in range(3):
        low, high = full.numel() * rank // 3, full.numel() * (rank + 1) // 3
        out = torch.empty(high - low)
        reader.read("master", ShardSpec("w", (23, 17), low, high - low), out)
        assert torch.equal(out, full.reshape(-1)[low:high])


def test_only_the_blocks_needed_are_read(tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    full = numbers(160)
    save_one(tmp_path, "a", {"w": full})
    fetched: list[int] = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: (fetched.append(len(to[0])), real(fd, to, at))[1])
    out = torch.empty(20)
    Reader(tmp_path).read("param", ShardSpec("w", (160,), 30, 20), out)
    assert torch.equal(out, full[30:50])
    assert sum(fetched) == 3 * 64  # elements 16..63, 16 a block


def test_a_block_is_read_once_for_all_ranges_in_a_row_that_want_a_part_of_it(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = numbers(24, 8)  # 2 rows a block
    save_on_ranks(tmp_path, "a", [Brought([shard("param", "w", full, low, low + 64)]) for low in (0, 64, 128)])
    fetched: list[int] = []
    real = os.preadv
    reader = Reader(tmp_path)
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: (fetched.append(len(to[0])), real(fd, to, at))[1])
    columns = torch.empty(24, 3)
    specs = [ShardSpec("w", (24, 8), row * 8 + 2, 3) for row in range(24)]
    reader.read_all(Wish("param", spec, out) for spec, out in zip(specs, columns, strict=True))
    assert torch.equal(columns, full[:, 2:5])
    assert fetched == [64] * 12
    fetched.clear()
    outs = [torch.empty(16) for _ in range(3)]  # the same block whole, for several
    reader.read_all(Wish("param", ShardSpec("w", (24, 8), 32, 16), out) for out in outs)
    assert all(torch.equal(out.view(2, 8), full[4:6]) for out in outs)
    assert fetched == [64]


LARGE = 3 * (1 << 20) + 5  # fp32 elements: two blocks, the parts of neither at whole pages


@pytest.fixture
def large(tmp_path: Path) -> torch.Tensor:
    """A checkpoint of w [LARGE] behind 5 fp64, so that w begins within a page."""
    full = torch.arange(LARGE, dtype=torch.float32)
    save_one(tmp_path, "a", {"first": torch.arange(5.0, dtype=torch.float64), "w": full})
    return full


@pytest.mark.parametrize("shift", [0, 1, 10])  # the file's bytes begin 40 bytes into a page: 10 is aligned alike
@pytest.mark.parametrize("is_shared", [False, True])
def test_large_reads_come_whole_whatever_the_alignment(
    tmp_path: Path, large: torch.Tensor, monkeypatch: pytest.MonkeyPatch, shift: int, is_shared: bool
) -> None:
    direct: list[int] = []
    monkeypatch.setattr(place, "read_direct", lambda *args: (direct.append(len(args[1])), read_direct(*args))[1])
    flat = pages((LARGE + 20) * 4).view(torch.float32)
    out = flat[shift : shift + LARGE]
    Reader(tmp_path).read("param", ShardSpec("w", (LARGE,), 0, LARGE), out, is_shared=is_shared)
    assert torch.equal(out, large)
    assert flat[:shift].count_nonzero() == flat[shift + LARGE :].count_nonzero() == 0
    assert sum(direct) == (0 if is_shared or not takes_direct_io(tmp_path) else LARGE * 4)


def test_a_file_system_that_refuses_direct_reads_gets_ordinary_ones(
    tmp_path: Path, large: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(place, "read_direct", refuse)
    assert torch.equal(Reader(tmp_path).read_full("param", "w"), large)


@pytest.mark.parametrize("byte", [100, 3 << 20, (8 << 20) + 100])
def test_damage_ends_a_large_read_with_nothing_on_its_way(tmp_path: Path, large: torch.Tensor, byte: int) -> None:
    file = next((tmp_path / "a").glob("rank-*"))
    flip(file, file.stat().st_size - LARGE * 4 + byte)
    out = torch.empty(LARGE)
    with pytest.raises(CheckpointDamaged, match="param of w.*checksum"):
        Reader(tmp_path).read("param", ShardSpec("w", (LARGE,), 0, LARGE), out)
    out.zero_()
    time.sleep(0.01)
    assert out.count_nonzero() == 0


def test_a_large_file_cut_after_opening_is_named(tmp_path: Path, large: torch.Tensor) -> None:
    reader = Reader(tmp_path)
    file = next((tmp_path / "a").glob("rank-*"))
    os.truncate(file, file.stat().st_size - (3 << 20))
    with pytest.raises(CheckpointDamaged, match=r"param of w, bytes.*the file ends after"):
        reader.read_full("param", "w")


def test_a_read_leaves_what_lies_around_its_target_alone(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {"w": torch.arange(10.0)})
    flat = torch.full((30,), -1.0)
    Reader(tmp_path).read("param", ShardSpec("w", (10,), 2, 5), flat[10:15])
    assert flat.tolist() == [-1.0] * 10 + [2.0, 3.0, 4.0, 5.0, 6.0] + [-1.0] * 15


def test_tensors_on_a_device_go_through_host_blocks(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("reader", "shard_file"):
        monkeypatch.setattr(f"craken.checkpoint.{module}.in_host_memory", lambda tensor: False)
    full = numbers(77)
    save_one(tmp_path, "a", {"w": full})
    out = torch.empty(60)
    Reader(tmp_path).read("param", ShardSpec("w", (77,), 10, 60), out)
    assert torch.equal(out, full[10:70])


def test_reading_into_a_parameter_that_requires_grad_works(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {"w": torch.arange(4.0)})
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    Reader(tmp_path).read("param", ShardSpec("w", (4,), 0, 4), parameter)
    assert parameter.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_shapes_dtypes_kinds_and_names_are_told(tmp_path: Path) -> None:
    tensors = {"s": torch.tensor(2.0), "e": torch.empty(0, 3), "h": torch.zeros(2, 2, dtype=torch.bfloat16)}
    pieces = [whole("param", name, tensor) for name, tensor in tensors.items()]
    save_on_ranks(tmp_path, "a", [Brought([*pieces, whole("exp_avg", "h", numbers(2, 2))], {"g": torch.ones(2)})])
    reader = Reader(tmp_path)
    assert (reader.kinds(), reader.names("param"), reader.names("none")) == (["param", "exp_avg"], ["s", "e", "h"], [])
    assert [reader.shape("param", name) for name in tensors] == [(), (0, 3), (2, 2)]
    assert [reader.dtype(kind, "h") for kind in ("param", "exp_avg")] == [torch.bfloat16, torch.float32]
    assert reader.read_full("param", "s").shape == ()
    assert reader.read_full("param", "e").shape == (0, 3)


@pytest.mark.parametrize(
    ("spec", "out", "message"),
    [
        (ShardSpec("w", (8,), 0, 8), torch.empty(8), r"param of w: stored with shape \(2, 4\), asked for.*\(8,\)"),
        (ShardSpec("w", (2, 4), 0, 8), torch.empty(8).half(), "stored as torch.float32, asked for as torch.float16"),
        (ShardSpec("w", (2, 4), 0, 8), torch.empty(7), "expected a contiguous tensor of 8 elements"),
        (ShardSpec("w", (2, 4), 0, 4), torch.empty(8)[::2], r"strides \(2,\)"),
        (ShardSpec("v", (2, 4), 0, 8), torch.empty(8), r"holds no param of v; it has 1 tensors.*'w'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, spec: ShardSpec, out: torch.Tensor, message: str) -> None:
    save_one(tmp_path, "a", {"w": numbers(2, 4)})
    with pytest.raises(ValueError, match=message):
        Reader(tmp_path).read("param", spec, out)


def test_an_unknown_kind_is_answered_with_the_kinds_there_are(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {"w": numbers(2)})
    with pytest.raises(ValueError, match=r"holds no master of w; it has the kinds \['param'\]"):
        Reader(tmp_path).read_full("master", "w")


def test_the_state_of_a_rank_that_did_not_save_is_an_error(tmp_path: Path) -> None:
    save_one(tmp_path, "a", {})
    with pytest.raises(ValueError, match="saved by 1 ranks, so there is no state of rank 1"):
        Reader(tmp_path).rank_state(1)


def test_a_missing_file_is_named_with_its_tensors(tmp_path: Path) -> None:
    path = save_one(tmp_path, "a", {"w": numbers(2)})
    (path / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointDamaged, match=r"rank-00000.safetensors is missing; it holds 2 .*param of w"):
        Reader(tmp_path)


def test_a_truncated_file_is_named_with_its_tensors(tmp_path: Path) -> None:
    path = save_one(tmp_path, "a", {"w": numbers(2)}) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointDamaged, match=r"rank-00000.safetensors has \d+ bytes, expected \d+.*param of w"):
        Reader(tmp_path)


def test_a_file_cut_after_opening_is_named(tmp_path: Path) -> None:
    path = save_one(tmp_path, "a", {"w": numbers(2)}) / "rank-00000.safetensors"
    reader = Reader(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointDamaged, match=r"safetensors: param of w, bytes.*the file ends after"):
        reader.read_full("param", "w")
    path.unlink()
    with pytest.raises(CheckpointDamaged, match=r"safetensors is missing"):
        reader.read_full("param", "w")


def test_a_flipped_bit_is_found_in_the_block_that_is_read_and_names_the_tensor(
    tmp_path: Path, small_blocks: None
) -> None:
    full = numbers(64)
    path = save_one(tmp_path, "a", {"w": full})
    reader = Reader(tmp_path)
    start = reader._index.tensors["param", "w"].pieces[0].start
    flip(path / "rank-00000.safetensors", start + 4 * 20)
    out = torch.empty(4)
    reader.read("param", ShardSpec("w", (64,), 4, 4), out)  # another block: whole
    assert torch.equal(out, full[4:8])
    with pytest.raises(CheckpointDamaged, match=r"rank-00000.safetensors: param of w, bytes.*damaged: checksum"):
        reader.read("param", ShardSpec("w", (64,), 30, 4), out)


def test_an_index_of_a_newer_format_asks_for_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "VERSION", 2)
    save_one(tmp_path, "a", {"w": numbers(2)})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format version 2, this release reads versions up to 1: upgrade"):
        Reader(tmp_path)


def test_readers_need_no_more_than_the_folder(tmp_path: Path) -> None:
    save_one(tmp_path / "here", "a", {"w": numbers(3)})
    (tmp_path / "here").rename(tmp_path / "there")
    assert torch.equal(Reader(tmp_path / "there").read_full("param", "w"), numbers(3))


def test_as_many_files_are_open_as_are_read_from_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, num_ranks = numbers(60), 30
    brought = [Brought([shard("param", "w", values, 2 * rank, 2 * rank + 2)]) for rank in range(num_ranks)]
    assert all(isinstance(done, Path) for done in save_on_ranks(tmp_path, "a", brought))
    open_now, most, real = set(), [0], reader_module.open_file

    class Counted:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = real(*args, **options)
            self.part_bytes, self.read_into = self.file.part_bytes, self.file.read_into
            open_now.add(self)
            most[0] = max(most[0], len(open_now))

        def close(self) -> None:
            self.file.close()
            open_now.remove(self)

    monkeypatch.setattr(reader_module, "open_file", Counted)
    out = torch.empty(60)
    reader = Reader(tmp_path)
    reader.read_all([Wish("param", ShardSpec("w", (60,), low, 2), out[low : low + 2]) for low in range(0, 60, 2)])
    assert torch.equal(out, values)
    assert most[0] == reader_module._NUM_FILES
    assert not open_now
