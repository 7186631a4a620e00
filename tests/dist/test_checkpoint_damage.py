"""Each kind of byte in a checkpoint damaged: every rank is told the file and the tensor, and the one before loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from craken.checkpoint import Reader, verify
from tests.dist.topologies import Topology, start, train
from tests.unit.checkpoint.ranks import flip

TOPOLOGY = Topology(2, 2)
STEPS_AFTER = 2
RANK_0, RANK_1 = "rank-00000.safetensors", "rank-00001.safetensors"


def save_two(folder: str) -> list[list[float]]:
    """Save `first` and, a step later, `second`; return the losses that follow each."""
    engine = start(TOPOLOGY, folder)
    losses = train(engine, 1)
    engine.save_checkpoint(folder, tag="first")
    losses += train(engine, 1)
    engine.save_checkpoint(folder, tag="second", client_state={"table": torch.arange(100)})
    losses += train(engine, STEPS_AFTER)
    engine.destroy()
    return [losses[1 : 1 + STEPS_AFTER], losses[2:]]


class Loaded(NamedTuple):
    """What a rank made of a damaged folder: the error's text, "" for none, and the losses it went on with."""

    error: str
    losses: list[float]


def load_each(folders: list[str]) -> list[Loaded]:
    """Load each folder by its `latest` and, where that fails, by the tag `first`, in one engine."""
    engine, found = start(TOPOLOGY, "", nudge=1.0), []
    for folder in folders:
        error = ""
        try:
            engine.load_checkpoint(folder)
        except (ValueError, OSError) as caught:
            error = str(caught)
            engine.load_checkpoint(folder, tag="first")
        found.append(Loaded(error, train(engine, STEPS_AFTER)))
    engine.destroy()
    return found


def in_tensor(kind: str, file: str, *, number: int = 0) -> Callable[[Path], None]:
    """Return what flips a bit in the middle of the `number`-th tensor of `kind` that has a piece in `file`."""

    def damage(folder: Path) -> None:
        records = Reader(folder)._index.tensors.values()
        pieces = [piece for record in records if record.kind == kind for piece in record.pieces if piece.file == file]
        flip(folder / "second" / file, (pieces[number].start + pieces[number].end) // 2, 1 << 6)

    return damage


def in_index(after: str) -> Callable[[Path], None]:
    """Return what changes the character behind the first place where the index has `after`."""

    def damage(folder: Path) -> None:
        path = folder / "second" / "index.json"
        position = path.read_text().index(after) + len(after)
        flip(path, position)

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def zero_a_page(folder: Path) -> None:
    """A page that never reached the disk."""
    start = next(file.data_start for file in Reader(folder)._index.files if file.name == RANK_1)
    with (folder / "second" / RANK_1).open("r+b") as file:
        file.seek(start)
        file.write(bytes(4096))


def swap_files(folder: Path) -> None:
    one, other, spare = (folder / "second" / name for name in (RANK_0, RANK_1, "spare"))
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def take_from_first(folder: Path) -> None:
    """A file of the same size and layout, from a step before."""
    shutil.copy(folder / "first" / RANK_1, folder / "second" / RANK_1)


WEIGHT_OR_STATE = f"{RANK_1}: (weight|optimizer.exp_avg(_sq)?) of "
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "index text": (in_index('"fqn": "'), "second/index.json is damaged: its checksum does not fit"),
    "index checksum": (in_index('"checksum": "'), "second/index.json is damaged: its checksum does not fit"),
    "index syntax": (in_index('"bod'), "second/index.json is damaged"),
    "index cut": (cut("second/index.json", 0.5), "second/index.json is damaged"),
    "index emptied": (cut("second/index.json", 0.0), "second/index.json is damaged"),
    "index missing": (lambda folder: (folder / "second/index.json").unlink(), "'second', which does not exist.*first"),
    "weight": (in_tensor("weight", RANK_1), rf"{RANK_1}: weight of \S+, bytes .* are damaged: checksum"),
    "other weight": (in_tensor("weight", RANK_0, number=3), rf"{RANK_0}: weight of \S+, bytes .* are damaged"),
    "moment": (in_tensor("optimizer.exp_avg", RANK_1), rf"{RANK_1}: optimizer\.exp_avg of \S+, bytes"),
    "square": (in_tensor("optimizer.exp_avg_sq", RANK_0), rf"{RANK_0}: optimizer\.exp_avg_sq of \S+, bytes"),
    "frozen weight": (in_tensor("frozen", RANK_0), rf"{RANK_0}: frozen of position\.weight, bytes"),
    "rank state": (in_tensor("rank_state", RANK_1), rf"{RANK_1}: rank_state of 1\S*, bytes"),
    "shared state": (in_tensor("shared_state", RANK_0), rf"{RANK_0}: shared_state of \S+, bytes"),
    "page lost": (zero_a_page, WEIGHT_OR_STATE),
    "file cut": (cut(f"second/{RANK_1}", 0.7), rf"{RANK_1} has \d+ bytes, expected \d+: .* such as weight of"),
    "file emptied": (cut(f"second/{RANK_0}", 0.0), rf"{RANK_0} has 0 bytes, expected \d+: .* such as weight of"),
    "file longer": (cut(f"second/{RANK_0}", 1.1), rf"{RANK_0} has \d+ bytes, expected \d+: .* such as weight of"),
    "file missing": (lambda folder: (folder / "second" / RANK_1).unlink(), rf"{RANK_1} is missing; it holds \d+ tens"),
    "files swapped": (swap_files, r"rank-0000\d.safetensors(: weight of| has)"),
    "file of another step": (take_from_first, rf"{RANK_1}: weight of \S+, bytes .* are damaged: checksum"),
    "latest": (lambda folder: flip(folder / "latest", 2), r"latest names the tag 'sebond', which.*first, second"),
    "latest cut": (cut("latest", 0.5), r"latest names the tag 'sec', which does not exist.*first, second"),
    "latest emptied": (cut("latest", 0.0), r"latest is damaged .*first, second"),
}


@pytest.fixture(scope="module")
def saved(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_ranks(save_two, 2, str(folder))[0]


def test_damage_is_named_on_all_ranks_and_the_previous_checkpoint_loads(run_ranks, tmp_path, saved) -> None:
    folder, (after_first, _) = saved
    copies = [Path(shutil.copytree(folder, tmp_path / name)) for name in CASES]
    for copy, (damage, _) in zip(copies, CASES.values(), strict=True):
        damage(copy)
    mine, other = run_ranks(load_each, 2, list(map(str, copies)))
    assert mine == other
    for copy, (_, message), loaded in zip(copies, CASES.values(), mine, strict=True):
        with pytest.raises(ValueError, match=message):
            raise ValueError(loaded.error)
        assert loaded.losses == after_first, copy.name
        assert verify(copy / "first") == []
        assert verify(copy / "second") or copy.name.startswith("latest"), copy.name


def test_damage_in_a_header_is_found_by_verify_and_changes_nothing(run_ranks, tmp_path, saved) -> None:
    folder, (_, after_second) = saved
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in (RANK_0, RANK_1):
        flip(copy / "second" / name, 100)
    assert [(found.file, found.tensor) for found in verify(copy / "second")] == [(RANK_0, None), (RANK_1, None)]
    assert run_ranks(load_each, 2, [str(copy)]) == [[Loaded("", after_second)]] * 2


def test_without_latest_nothing_is_loaded_and_a_tag_can_be_named(run_ranks, tmp_path, saved) -> None:
    folder, (_, after_second) = saved
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "latest").unlink()
    assert run_ranks(load_without_latest, 2, str(copy)) == [((None, None), after_second)] * 2


def load_without_latest(folder: str) -> tuple[Any, list[float]]:
    engine = start(TOPOLOGY, "", nudge=1.0)
    nothing = engine.load_checkpoint(folder)
    engine.load_checkpoint(folder, tag="second")
    losses = train(engine, STEPS_AFTER)
    engine.destroy()
    return nothing, losses
