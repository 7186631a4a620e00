"""`craken io`: measures what a folder's disk gives and says which `aio` settings suit it."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from craken.disk.measure import PLAIN_CALL_BYTES, Measured, Speed, Verb, cheapest_good_one, measure, settings_to_try
from craken.disk.settings import ALIGNMENT_BYTES
from craken.log import logger

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LEAST_SIZE = 64 << 10
_LOGGED_WIDTH = 120  # of the table when the output is no terminal


def main(words: Sequence[str]) -> int:
    """Run `craken io`; return the exit code, 2 when the folder cannot be used."""
    asked = _parser().parse_args(words)
    verbs: list[Verb] = [verb for verb in ("write", "read") if getattr(asked, verb)] or ["write", "read"]
    problem = _problem(asked)
    if problem:
        logger.error(problem)
        return 2
    console = Console(width=None if os.isatty(1) else _LOGGED_WIDTH, highlight=False)

    def progress(parts: Sequence[int]) -> Iterable[int]:
        return track(parts, "measuring", console=console, transient=True, disable=not console.is_terminal)

    settings = settings_to_try(asked.block, asked.queue_depth, asked.threads)
    try:
        measured = measure(asked.folder, asked.size, settings, verbs, progress)
    except OSError as error:
        logger.error(error.strerror or str(error))
        return 2
    best = cheapest_good_one(measured.speeds)
    console.print(_table(measured, best, verbs, asked.folder))
    console.print(f"\nfor the config file: {_section(best)}", soft_wrap=True)
    return 0


def _problem(asked: argparse.Namespace) -> str:
    """Return what is wrong with the arguments, or nothing."""
    if not asked.folder.is_dir():
        instead = "name its folder" if asked.folder.exists() else f"make it first: mkdir -p {asked.folder}"
        return f"--folder: expected an existing folder, got {asked.folder}; {instead}"
    if asked.size < _LEAST_SIZE:
        return f"--size: expected at least {_LEAST_SIZE >> 10}KiB, got {asked.size} bytes"
    if asked.block is not None and (asked.block % ALIGNMENT_BYTES or asked.block > asked.size):
        return f"--block: expected a multiple of {ALIGNMENT_BYTES} bytes up to --size, got {asked.block}"
    return ""


def parse_bytes(text: str) -> int:
    """Return the bytes that `8MiB`, `8M`, `1GiB` or `4096` mean; ValueError for anything else, zero too."""
    found = re.fullmatch(r"(\d+)\s*(?:([KMGT]?)(?:i?B)?)", text.strip(), re.IGNORECASE)
    num_bytes = int(found[1]) * _UNITS[found[2].upper()] if found else 0
    if num_bytes < 1:
        raise ValueError(f"expected a size such as 8MiB or 1GiB (units are powers of 1024), got {text!r}")
    return num_bytes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="craken io", description="Measure a folder's disk past the page cache, and find the aio settings for it."
    )
    parser.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="on the disk in question (here)")
    parser.add_argument("--size", type=_size, default=1 << 30, metavar="BYTES", help="of the file, gone after (1GiB)")
    parser.add_argument("--block", type=_size, metavar="BYTES", help="block_size to measure (1MiB)")
    parser.add_argument("--queue-depth", type=_count, metavar="N", help="queue_depth to measure (1, 8 and 32)")
    parser.add_argument("--threads", type=_count, metavar="N", help="intra_op_parallelism to measure (1, 2, 4 and 8)")
    parser.add_argument("--read", action="store_true", help="measure reading only")
    parser.add_argument("--write", action="store_true", help="measure writing only")
    return parser


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _table(measured: Measured, best: Speed, verbs: Sequence[Verb], folder: Path) -> Table:
    how = "direct I/O" if measured.is_direct else "through the page cache, direct I/O is refused here"
    table = Table(title=Text(f"{folder.resolve()}: {how}"), title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("")
    for heading in ("block_size", "queue_depth", "threads"):
        table.add_column(heading, justify="right")
    for verb in verbs:
        table.add_column(f"{verb} GB/s", justify="right")
        table.add_column("x plain", justify="right")
    call_mib = PLAIN_CALL_BYTES >> 20
    table.add_row("plain loop", f"{call_mib} MiB", "1", "1", *_numbers(measured.plain, measured.plain, verbs))
    table.add_section()
    for speed in measured.speeds:
        table.add_row(*_row(speed, speed is best), *_numbers(speed, measured.plain, verbs))
    return table


def _row(speed: Speed, is_best: bool) -> list[str]:
    settings = speed.settings
    assert settings is not None
    num_bytes = settings.block_bytes
    block = f"{num_bytes >> 10} KiB" if num_bytes % (1 << 20) else f"{num_bytes >> 20} MiB"
    return ["craken <-" if is_best else "craken", block, str(settings.queue_depth), str(settings.num_threads)]


def _numbers(speed: Speed, plain: Speed, verbs: Sequence[Verb]) -> list[str]:
    return [
        text
        for verb in verbs
        for text in (
            f"{speed.bytes_per_s[verb] / 1e9:.2f}",
            f"{speed.bytes_per_s[verb] / plain.bytes_per_s[verb]:.2f}",
        )
    ]


def _section(speed: Speed) -> str:
    settings = speed.settings
    assert settings is not None
    section = {
        "block_size": settings.block_bytes,
        "queue_depth": settings.queue_depth,
        "intra_op_parallelism": settings.num_threads,
    }
    return f'"aio": {json.dumps(section)}'
