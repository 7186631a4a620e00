"""Checkpoints in a store without renames: a tag is there from the moment its index is, and `latest` comes last.

    URL/TAG/rank-00000-TOKEN.safetensors   names that no other save uses; no reader asks for them before
    URL/TAG/index-TOKEN.json               what the index will be
    URL/TAG/index.json                     written last, by one request, which stores carry out whole or not at all
    URL/latest                             text, one tag

Saving under an existing tag so switches from the old files to the new with its index; what the index doesn't name is
deleted afterwards, and with it what killed savers left; files by other names stay. One job at a time saves under a tag.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from craken.checkpoint.index import INDEX_NAME
from craken.checkpoint.place import Url, reach
from craken.log import warn_once

_OURS = re.compile(r"rank-\d{5,}-[0-9a-f]{16}\.safetensors|index(-[0-9a-f]{16})?\.json")


class StagedUrl(NamedTuple):
    """A tag that is being written: `staged / name` is a name of this save alone."""

    tag: Url
    token: str

    @property
    def name(self) -> str:
        """The save's own."""
        return f"{self.tag.name}-{self.token}"

    def __truediv__(self, name: str) -> Url:
        stem, _, extension = name.rpartition(".")
        return self.tag / f"{stem}-{self.token}.{extension}"


def stage(tag: Url) -> StagedUrl:
    """Begin to write `tag`; touches nothing. ValueError when the place holds other things than a checkpoint."""
    names = _names_in(tag)
    if names and not any(map(_OURS.fullmatch, names)):
        raise ValueError(
            f"{tag} holds {names[:3]} and no {INDEX_NAME}: it is no checkpoint of ours; choose another tag"
        )
    return StagedUrl(tag, secrets.token_hex(8))


def publish(staged: StagedUrl) -> None:
    """Let the tag's index be the one that was staged."""
    store, path = reach(staged / INDEX_NAME)
    write(staged.tag / INDEX_NAME, store.cat_file(path))


def delete_tag(tag: Url) -> None:
    """Delete the index, with which the checkpoint ends, then all files of ours under the tag."""
    store, path = reach(tag / INDEX_NAME)
    store.rm_file(path)
    tidy(tag)


def tidy(tag: Url) -> None:
    """Delete files of ours that the tag's index doesn't name: replaced ones, or all that a failed save has written."""
    try:
        store, root = reach(tag)
        names = _names_in(tag)
        kept: set[str] = set()
        if INDEX_NAME in names:
            index = json.loads(store.cat_file(f"{root}/{INDEX_NAME}"))
            kept = {INDEX_NAME, *(file["name"] for file in index["body"]["files"])}
        for name in filter(_OURS.fullmatch, sorted(set(names) - kept)):
            store.rm_file(f"{root}/{name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn_once(f"cannot delete what is no longer needed in {tag} ({error}); remove it by hand")


def write(file: Url, data: bytes) -> None:
    """Write a whole file by one request."""
    store, path = reach(file)
    store.makedirs(store._parent(path), exist_ok=True)
    store.pipe_file(path, data)


@contextmanager
def writing(file: Url) -> Iterator[Any]:
    """Yield a stream to a new file, which is there once the block has ended well."""
    store, path = reach(file)
    store.makedirs(store._parent(path), exist_ok=True)
    with store.open(path, "wb") as stream:
        yield stream


def exists(folder: Url) -> bool:
    """Whether anything lies under the URL."""
    return bool(_names_in(folder))


def tags_in(folder: Url) -> list[str]:
    """Return the names under the URL that hold an index."""
    store, root = reach(folder)
    return [name for name in _names_in(folder) if store.isfile(f"{root}/{name}/{INDEX_NAME}")]


def _names_in(folder: Url) -> list[str]:
    store, root = reach(folder)
    store.invalidate_cache()  # another process may have written since this one looked
    try:
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in store.ls(root, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
