"""The index: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from craken.checkpoint import index as index_module
from craken.checkpoint.entry import Entry
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.index import FileRecord, Index, PieceRecord, WrittenFile, build_index, index_to_text, read_index

LOW, HIGH = Entry("param", "w", (2, 3), "F32", 0, 2), Entry("param", "w", (2, 3), "F32", 2, 4)
EMPTY = Entry("param", "e", (0,), "BF16", 0, 0)


def an_index() -> Index:
    """Two ranks; the first holds the tensor's end."""
    files = [FileRecord(f"rank-{rank}.safetensors", 5000, 4096, "00") for rank in range(2)]
    written = [
        WrittenFile(files[0], [(HIGH, PieceRecord(files[0].name, 4096, 4112, 2, 4, ("aa", "bb")))]),
        WrittenFile(files[1], [(LOW, PieceRecord(files[1].name, 4096, 4104, 0, 2, ("cc",)))]),
    ]
    return build_index(written, [HIGH, EMPTY, LOW], block_bytes=8, shared_state={"k": [1, "\u00fc"]})


def test_pieces_lie_in_order_and_tensors_without_elements_are_kept() -> None:
    index = an_index()
    assert [piece.offset for piece in index.tensors["param", "w"].pieces] == [0, 2]
    assert index.tensors["param", "e"].pieces == ()
    assert index.world_size == 2


def test_the_text_reads_back_to_the_same_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(index_to_text(an_index()))
    assert read_index(tmp_path) == an_index()


def test_the_text_is_plain_json_for_others() -> None:
    document = json.loads(index_to_text(an_index()))
    assert (document["format"], document["version"]) == ("craken-checkpoint", 1)
    assert document["body"]["tensors"][0]["pieces"][0] == {
        "file": "rank-1.safetensors", "start": 4096, "end": 4104, "offset": 0, "numel": 2, "blocks": ["cc"]
    }  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"a": 1}', "[" * 100_000, '{"format": "other", "version": 1}']
)
def test_what_is_no_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(CheckpointDamaged, match=r"index.json is damaged or is no checkpoint index"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("tensors"),
        lambda body: body["files"][0].update(name="../secret"),
        lambda body: body["tensors"][0]["pieces"][0].update(file="/etc/passwd"),
        lambda body: body["tensors"][0].update(dtype="F12"),
        lambda body: body["tensors"][0].pop("shape"),
    ],
)
def test_a_signed_index_that_makes_no_sense_is_refused(tmp_path: Path, change: Any) -> None:
    body = json.loads(index_to_text(an_index()))["body"]
    change(body)
    text = json.dumps(body)
    head = json.dumps({"format": "craken-checkpoint", "version": 1, "checksum": index_module._checksum(text)})
    (tmp_path / "index.json").write_text(f'{head[:-1]}, "body": {text}}}\n')
    with pytest.raises(CheckpointDamaged, match="not a well-formed index"):
        read_index(tmp_path)
