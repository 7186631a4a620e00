"""Every byte of a checkpoint folder counts, or does not matter at all."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from craken.checkpoint import Reader, verify
from craken.checkpoint.state_codec import encode_state
from tests.unit.checkpoint.ranks import Brought, flip, numbers, save_on_ranks, shard, whole

FULL = numbers(30, 7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, several kinds and dtypes, states with tensors, two tags."""
    folder = tmp_path_factory.mktemp("saved")
    brought = [
        Brought(
            [
                shard("master", "w", FULL, 105 * rank, 105 * rank + 105),
                whole("param", f"b{rank}", numbers(9).bfloat16()),
            ],
            {"rng": torch.arange(100, dtype=torch.uint8), "seed": (1, 2.5)},
            {"step": 7, "moments": torch.ones(3)},
        )
        for rank in range(2)
    ]
    save_on_ranks(folder, "global_step1", brought)
    save_on_ranks(folder, "global_step2", brought)
    return folder


def content(folder: Path) -> object:
    """Everything that a resume would take from the checkpoint, in comparable form."""
    reader = Reader(folder)
    tensors = {
        (kind, fqn): (reader.read_full(kind, fqn).view(torch.uint8).tolist(), reader.shape(kind, fqn))
        for kind in reader.kinds()
        for fqn in reader.names(kind)
    }
    states = [reader.shared_state, *(reader.rank_state(rank) for rank in range(reader.world_size))]
    encoded = [encode_state(state, root="state") for state in states]
    return tensors, [(value, {name: t.tolist() for name, t in stored.items()}) for value, stored in encoded]


def test_a_whole_checkpoint_has_no_damage(saved: Path) -> None:
    assert verify(saved / "global_step1") == verify(saved / "global_step2") == []


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "index.json"])
def test_any_flipped_bit_is_found_by_verify_and_is_named_or_harmless_on_loading(
    saved: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    path, expected = folder / "global_step2" / name, content(saved)
    size, chosen = path.stat().st_size, random.Random(5)
    positions = {0, 7, 8, size - 1, *chosen.sample(range(size), 60)}
    if name != "index.json":
        positions |= {4096, *chosen.sample(range(4096, size), 40)}
    outcomes = []
    for position in positions:
        mask = 1 << chosen.randrange(8)
        flip(path, position, mask)
        damage = verify_or_newer(path.parent)
        assert damage or path.read_bytes()[position] in b" \t\r\n", position
        outcomes.append(content_or_complaint(folder))
        flip(path, position, mask)
    assert all(outcome == expected or name in outcome for outcome in outcomes)
    assert any(isinstance(outcome, str) for outcome in outcomes)
    assert content(folder) == expected


def content_or_complaint(folder: Path) -> Any:
    try:
        return content(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def verify_or_newer(path: Path) -> list[object]:
    try:
        return list(verify(path))
    except ValueError as error:  # a flip in the version's digit
        return [error] if "upgrade" in str(error) else []


def test_any_flipped_bit_in_latest_is_named_or_leads_to_a_whole_checkpoint(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    size, expected = (folder / "latest").stat().st_size, content(saved)
    for position in range(size):
        for bit in range(8):
            flip(folder / "latest", position, 1 << bit)
            outcome = content_or_complaint(folder)
            assert outcome == expected or "global_step1, global_step2" in outcome
            flip(folder / "latest", position, 1 << bit)


def test_damage_names_file_and_tensor(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "copy")) / "global_step1"
    start = next(p.start for p in Reader(saved)._index.tensors["master", "w"].pieces if p.file.startswith("rank-00001"))
    flip(path / "rank-00001.safetensors", start + 3)
    flip(path / "rank-00000.safetensors", 20)
    header, block = verify(path)
    assert (header.file, header.tensor) == ("rank-00000.safetensors", None)
    assert "header is damaged" in header.reason
    assert (block.file, block.tensor) == ("rank-00001.safetensors", "master of w")


def test_a_missing_file_a_short_file_and_a_missing_index_are_damage(saved: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "copy")) / "global_step1"
    (path / "rank-00000.safetensors").unlink()
    short = path / "rank-00001.safetensors"
    short.write_bytes(short.read_bytes()[:4200])
    damage = verify(path)
    assert damage[0].file == "rank-00000.safetensors"
    assert "is missing" in damage[0].reason
    assert damage[1].file == "rank-00001.safetensors"
    assert "has 4200 bytes, expected" in damage[1].reason
    assert {found.tensor for found in damage[2:]} >= {"param of b1"}
    (path / "index.json").unlink()
    assert [found.file for found in verify(path)] == ["index.json"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        verify(path / "nowhere")
