"""`craken inspect`: prints what a checkpoint holds, and with --verify reads and checks every block of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from craken.checkpoint.contents import Contents, describe
from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.verifier import Damage, verify
from craken.log import logger

_SHOWN_TAGS = 8


class Section(NamedTuple):
    """A table: its title, headings, and rows of texts; columns of numbers are set to the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def main(words: Sequence[str]) -> int:
    """Run `craken inspect`; return the exit code: 1 when damage was found, 2 when there is no such checkpoint."""
    asked = _parser().parse_args(words)
    console = Console(highlight=False)
    try:
        contents = describe(asked.checkpoint, asked.tag)
        damage = verify(contents.path) if asked.verify else None
    except CheckpointDamaged as error:
        logger.error(str(error))
        return 1
    except (ValueError, OSError) as error:
        logger.error(str(error))
        return 2
    is_damaged = bool(damage) or any(file.problem for file in contents.files)
    if asked.json:
        found = _as_json(contents, damage, with_tensors=asked.tensors)
        console.print(json.dumps(found, indent=2), soft_wrap=True, markup=False)
        return int(is_damaged)
    for section in _sections(contents, damage, with_tensors=asked.tensors):
        _show(section, console)
    return int(is_damaged)


def human_bytes(num_bytes: int) -> str:
    """Return a size in powers of 1000, as disks are sold: `12.3 MB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="craken inspect", description="Say what a checkpoint holds.")
    parser.add_argument("checkpoint", metavar="CKPT", help="the folder with `latest` in it, or one tag's folder")
    parser.add_argument("--tag", help="a checkpoint other than the latest, such as global_step100")
    parser.add_argument("--verify", action="store_true", help="read and check every block; exit code 1 on damage")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _as_json(contents: Contents, damage: list[Damage] | None, *, with_tensors: bool) -> dict[str, Any]:
    found = asdict(contents)
    if not with_tensors:
        del found["tensors"]
    return found if damage is None else {**found, "damage": [item._asdict() for item in damage]}


def _sections(contents: Contents, damage: list[Damage] | None, *, with_tensors: bool) -> list[Section]:
    kinds = [
        (kind.kind, str(kind.num_tensors), f"{kind.numel:,}", human_bytes(kind.num_bytes), " ".join(kind.dtypes))
        for kind in contents.kinds
    ]
    files = [(file.name, human_bytes(file.num_bytes), file.problem or "present") for file in contents.files]
    sections = [
        Section(contents.path, (), _facts(contents)),
        Section("tensors by kind", ("kind", "tensors", "elements", "size", "dtypes"), kinds),
        Section("files", ("file", "size", "state"), files),
    ]
    if with_tensors:
        tensors = [
            (t.kind, t.name, " x ".join(map(str, t.shape)) or "scalar", t.dtype, str(t.num_pieces))
            for t in contents.tensors
        ]
        sections.append(Section("tensors", ("kind", "name", "shape", "dtype", "pieces"), tensors))
    if damage is not None:
        rows = [(item.file, item.tensor or "-", item.reason) for item in damage]
        title = f"{len(damage)} damaged places" if damage else "every block of every file is as it was written"
        sections.append(Section(title, ("file", "tensor", "what is wrong") if damage else (), rows))
    return sections


def _facts(contents: Contents) -> list[tuple[str, str]]:
    progress = {name: value for name, value in contents.progress.items() if value is not None}
    tags = contents.tags if len(contents.tags) <= _SHOWN_TAGS else ["...", *contents.tags[-_SHOWN_TAGS:]]
    facts = [
        ("tag", contents.tag + (" (the latest)" if contents.tag == contents.latest else "")),
        ("tags here", ", ".join(tags)),
        ("saved by", f"{contents.num_ranks} rank{'s' if contents.num_ranks > 1 else ''}"),
        *((name.replace("_", " "), str(value)) for name, value in progress.items()),
        ("parameters", f"{contents.num_parameters:,}"),
        ("optimizer", _optimizer(contents)),
        ("loss scale", _inline(contents.loss_scale)),
        ("lr scheduler", _inline(contents.lr_scheduler)),
        ("dataloader", _inline(contents.dataloader)),
        ("client state", ", ".join(contents.client_state) or "none"),
    ]
    return facts


def _optimizer(contents: Contents) -> str:
    if contents.optimizer is None:
        return "none"
    states = ", ".join(contents.optimizer_states) or "no tensors"
    return f"{states}; {'; '.join(_inline(group) for group in contents.optimizer)}"


def _inline(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return str(value)


def _show(section: Section, console: Console) -> None:
    if not console.is_terminal:
        console.print(section.title, soft_wrap=True, markup=False)
        for row in section.rows:
            console.print("  " + "  ".join(row), soft_wrap=True, markup=False)
        return
    table = Table(title=Text(section.title), title_justify="left", show_header=bool(section.headings), show_edge=False)
    for heading in section.headings or [""] * len(section.rows[0] if section.rows else ()):
        is_number = heading in ("tensors", "elements", "size", "pieces")
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*map(Text, row))
    console.print(table if section.rows else Text(section.title))
    console.print()
