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


def piece(body: dict[str, Any], rank: int = 1) -> dict[str, Any]:
    """The one that `rank` wrote."""
    return body["tensors"][0]["pieces"][1 - rank]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda body: body.pop("tensors"), "'tensors'"),
        (lambda body: body["tensors"][0].pop("shape"), "'shape'"),
        (lambda body: body.update(block_bytes=0), "a positive world_size and block_bytes"),
        (lambda body: body.update(world_size=0), "a positive world_size and block_bytes"),
        (lambda body: body.update(shared_state=[]), "a shared_state that is an object"),
        (lambda body: body["files"][0].update(name="../secret"), "file names without a folder.*'../secret'"),
        (lambda body: body["files"][0].update(name=".."), r"file names without a folder.*'\.\.'"),
        (lambda body: body["files"][0].update(name=""), "file names without a folder.*''"),
        (lambda body: body["files"].append(body["files"][0]), "each once, got 'rank-0.safetensors'"),
        (lambda body: body["files"][1].update(data_start=6000), "rank-1.safetensors: .* got 6000 of 5000"),
        (lambda body: body["tensors"].append(body["tensors"][0]), "param of w is there twice"),
        (lambda body: body["tensors"][0].update(dtype="F12"), "'F12'"),
        (lambda body: body["tensors"][0].update(shape="23"), r"param of w: .*shape \('2', '3'\)"),
        (lambda body: body["tensors"][0].update(shape=[7]), r"param of w: the pieces hold 6 elements, .*has 7"),
        (lambda body: body["tensors"][0]["pieces"].pop(), "param of w: the pieces hold 2 elements, .*has 6"),
        (lambda body: body["tensors"][0]["pieces"].pop(0), "rank-0.safetensors: .*param of w begins at element 2, exp"),
        (lambda body: body["tensors"][0]["pieces"].reverse(), "param of w begins at element 2, expected 0"),
        (
            lambda body: body["tensors"][0]["pieces"].insert(0, piece(body)),
            "param of w begins at element 0, expected 2",
        ),
        (lambda body: piece(body).update(file="/etc/passwd"), "/etc/passwd: .*that the index does not list"),
        (lambda body: piece(body).update(end=4100), r"rank-1.safetensors: .*param of w has bytes \[4096, 4100\).* 8 "),
        (lambda body: piece(body).update(start=4088, end=4096), "expected 8 between 4096 and 5000 for its 2 elements"),
        (lambda body: piece(body).update(start=4996, end=5004), "expected 8 between 4096 and 5000 for its 2 elements"),
        (lambda body: piece(body).update(start=4096.0), "param of w has numbers that are no counts: 4096.0"),
        (lambda body: piece(body).update(offset=-2), "param of w has numbers that are no counts"),
        (lambda body: piece(body).update(blocks=[]), "param of w has 0 checksums, expected 1 for 8 bytes"),
        (lambda body: piece(body, 0).update(blocks=["aa"]), "param of w has 1 checksums, expected 2 for 16 bytes"),
    ],
)
def test_a_signed_index_that_makes_no_sense_is_refused_by_name(tmp_path: Path, change: Any, named: str) -> None:
    body = json.loads(index_to_text(an_index()))["body"]
    change(body)
    text = json.dumps(body)
    head = json.dumps({"format": "craken-checkpoint", "version": 1, "checksum": index_module._checksum(text)})
    (tmp_path / "index.json").write_text(f'{head[:-1]}, "body": {text}}}\n')
    with pytest.raises(CheckpointDamaged, match=f"not a well-formed index.*: .*{named}"):
        read_index(tmp_path)


def test_an_index_of_many_pieces_a_tensor_is_built_in_one_sorting_each() -> None:
    entries = [Entry("param", "w", (8192,), "F32", i, 1) for i in range(8192)]
    sortings: list[int] = []

    class Offset(int):
        def __lt__(self, other: int) -> bool:
            sortings.append(1)
            return int(self) < int(other)

    pieces = [(entry, PieceRecord("f", 0, 4, Offset(entry.offset), 1, ("aa",))) for entry in entries]
    written = [WrittenFile(FileRecord("f", 5000, 4096, "00"), pieces)]
    build_index(written, entries, block_bytes=8, shared_state={})
    assert len(sortings) <= 8192
