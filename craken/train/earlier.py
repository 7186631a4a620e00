"""What an earlier run has left where this one goes: its flags, to go on with, and all that must not be overwritten."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from craken.checkpoint import CheckpointNotFound, Place, Reader, list_tags, newest_first, place_of
from craken.checkpoint.place import Url, host_path

AUTO = "auto"
FLAGS = "flags.json"
KEPT_FLAGS = "flags"  # in a checkpoint's client state


@contextlib.contextmanager
def _looking() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a store out of reach, a folder that may not be read
        raise ValueError(f"cannot look for an earlier run: {error}; check --checkpoints, --resume, --output") from error


@_looking()
def with_earlier(given: dict[str, Any], resume: str, *, default_output: Path) -> dict[str, Any]:
    """Return the flags of the run in `resume` (or in --output), overridden by those given now.

    With `auto` the folder must be the same each time: `default_output` is without a number. ValueError if there is no
    such run, or the place cannot be reached.
    """
    if resume == AUTO:
        output = given.get("output", str(default_output))
        file = output_at(output) / FLAGS
        earlier = json.loads(file.read_text("utf-8")) if file.exists() else _flags_at(given.get("checkpoints"))
        return {**earlier, **given, "output": output}
    if earlier := _flags_at(resume):
        return {**earlier, **given, "checkpoints": resume}
    if isinstance(place_at(resume), Url):
        raise ValueError(f"--resume {resume}: no checkpoint of a run there; expected a run's --checkpoints")
    folder = resume or given.get("output", "")
    if not folder:
        raise ValueError(
            "--resume without a folder needs --output; write --resume DIR, the folder of the run to go on with"
        )
    file = host_path(folder) / FLAGS
    if not file.exists():
        raise ValueError(f"--resume {folder}: no run of craken train there (no {file}); expected a run's output folder")
    return {**json.loads(file.read_text("utf-8")), **given, "output": folder}


def _flags_at(checkpoints: str | None) -> dict[str, Any]:
    """Return the flags in the newest checkpoint of a folder or a URL that can be read; none without one."""
    place = place_at(checkpoints or "")
    for tag in newest_first(place) if checkpoints else ():
        with contextlib.suppress(ValueError, CheckpointNotFound):  # damaged, a newer release's, or just deleted
            client = Reader(place, tag).shared_value("client")
            return dict(client.get(KEPT_FLAGS, {})) if isinstance(client, dict) else {}
    return {}


@_looking()
def check_unused(output: Path, checkpoints: Place) -> None:
    """ValueError where a run has been before: nothing is overwritten."""
    if (output / "metrics.jsonl").exists():
        raise ValueError(f"{output} already holds a run; go on with it (--resume {output}) or choose another --output")
    if list_tags(checkpoints):
        raise ValueError(f"{checkpoints} already holds checkpoints; go on (--resume auto) or choose another place")


def output_at(text: str) -> Path:
    """Return the folder of --output; ValueError for a URL."""
    try:
        return host_path(text)
    except ValueError as error:
        raise ValueError(f"{error}: write --checkpoints {text} beside an --output of this host") from error


def place_at(text: str | Path) -> Place:
    """Return a folder, the user's home written out, or the URL of a store."""
    place = place_of(text)
    return place.expanduser() if isinstance(place, Path) else place


def absolute(path: str) -> str:
    """Return a path that means the same from every folder; a URL as it is."""
    place = place_at(path)
    return str(place.resolve()) if isinstance(place, Path) else path
