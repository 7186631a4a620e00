"""`craken import`: turns a checkpoint that the original wrote into one of ours."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.original.importing import import_original
from craken.log import logger


def main(words: Sequence[str]) -> int:
    """Run `craken import`; return the exit code: 1 when the checkpoint is damaged, 2 when it cannot be done."""
    asked = _parser().parse_args(words)
    try:
        names = None if asked.groups is None else _names_in(asked.groups)
        done = import_original(asked.checkpoint, asked.out, asked.tag, names=names)
    except (ValueError, NotImplementedError, OSError) as error:
        logger.error(str(error))
        return 1 if isinstance(error, CheckpointDamaged) else 2
    logger.info(
        f"wrote {done.path}: step {done.global_steps}, {done.num_trained} trained and {done.num_frozen} frozen "
        f"parameters, optimizer states {', '.join(done.states) or 'none'}"
    )
    return 0


def _names_in(file: Path) -> list[list[str]]:
    try:
        groups: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    is_right = isinstance(groups, list) and all(
        isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups
    )
    if not is_right:
        raise ValueError(f"{file}: expected a JSON list with a list of parameter names for each optimizer group")
    return [list(group) for group in groups]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="craken import",
        description="Turn a checkpoint that DeepSpeed wrote into one of ours, which any stage on any number of ranks "
        "resumes from. The original stays as it is.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the folder given to save_checkpoint, or a tag's")
    parser.add_argument("out", metavar="OUT", help="the folder to write TAG and `latest` into")
    parser.add_argument("--tag", help="which checkpoint in CKPT (the one `latest` names)")
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help="JSON: a list of parameter names for each optimizer group; asked for where a stage-0 file leaves it open",
    )
    return parser
