"""One rank's file: safetensors to others, bytes with checksums to us."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from craken.checkpoint import shard_file
from craken.checkpoint.blocks import checksum_of
from craken.checkpoint.entry import entry_of
from craken.checkpoint.shard_file import plan_file, write_file
from tests.unit.checkpoint.ranks import numbers, shard, whole

MIXED = [
    whole("param", "flag", torch.tensor([True, False, True])),
    whole("param", "scalar", torch.tensor(3.5, dtype=torch.float64)),
    shard("exp_avg", "w", numbers(4, 5), 3, 17),
    whole("param", "w", numbers(4, 5).bfloat16()),
    whole("param", "none", torch.empty(0, 3)),
    whole("param", 'name with \u00fc and "quotes"', torch.arange(5)),
]


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    entries = [entry_of(piece) for piece in MIXED]
    write_file(path, entries, [piece.tensor for piece in MIXED])
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {entry.stored_name for entry in entries}
        for entry, piece in zip(entries, MIXED, strict=True):
            stored = file.get_tensor(entry.stored_name)
            assert tuple(stored.shape) == (entry.shape if entry.is_whole else (entry.numel,))
            assert stored.dtype == piece.tensor.dtype
            assert torch.equal(stored, piece.tensor.reshape(stored.shape))


def test_data_start_on_a_page_and_tensors_on_their_own_size() -> None:
    entries = [entry_of(piece) for piece in MIXED]
    layout = plan_file(entries)
    assert len(layout.header) % 4096 == 0
    sizes = {entry.stored_name: piece.tensor.element_size() for entry, piece in zip(entries, MIXED, strict=True)}
    assert [s % sizes[e.stored_name] for e, s in zip(entries, layout.starts, strict=True)] == [0] * len(entries)


def test_a_header_longer_than_a_page_moves_the_data_by_whole_pages() -> None:
    entries = [entry_of(whole("param", f"layer.{i}.weight", torch.zeros(1))) for i in range(100)]
    assert len(plan_file(entries).header) % 4096 == 0
    assert len(plan_file(entries).header) > 4096


def test_records_give_place_and_checksum_of_each_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_file, "BLOCK_BYTES", 16)
    piece = whole("param", "w", torch.arange(10.0))
    written = write_file(tmp_path / "f", [entry_of(piece)], [piece.tensor])
    data = (tmp_path / "f").read_bytes()
    record = written.pieces[0][1]
    assert written.file.num_bytes == len(data)
    assert written.file.header_checksum == checksum_of(memoryview(data[: written.file.data_start]))
    stored = data[record.start : record.end]
    assert stored == piece.tensor.numpy().tobytes()
    assert record.blocks == tuple(checksum_of(memoryview(stored[i : i + 16])) for i in range(0, 40, 16))


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset: real(fd, [data[0][:1000]], offset))
    piece = whole("param", "w", numbers(3000))
    record = write_file(tmp_path / "f", [entry_of(piece)], [piece.tensor]).pieces[0][1]
    assert (tmp_path / "f").read_bytes()[record.start : record.end] == piece.tensor.numpy().tobytes()


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", [], [])
