"""Checkpoints in a store without renames: a tag is there from the moment its index is, and `latest` comes last.

    URL/TAG/rank-00000-TOKEN.safetensors   names that no other save uses; no reader asks for them before
    URL/TAG/index-TOKEN.json               what the index will be
    URL/TAG/index.json                     written last, by one request, which stores carry out whole or not at all
    URL/latest                             text, one tag
    URL/.TAG.deleting                      names under TAG that are being deleted, until they are

Saving under an existing tag so switches from the old files to the new with its index; what the index doesn't name is
deleted afterwards, and with it what killed savers left; files by other names stay. One job at a time saves under a tag.
A deletion that is cut short is finished by the next save that deletes old checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from craken.checkpoint.index import INDEX_NAME
from craken.checkpoint.place import Url, reach
from craken.log import warn_once

_OURS = re.compile(r"rank-\d{5,}-[0-9a-f]{16}\.safetensors|index(-[0-9a-f]{16})?\.json")
_DELETING = re.compile(r"\.(?P<tag>.+)\.deleting")


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
    note, names = tag.parent / f".{tag.name}.deleting", _names_in(tag)
    write(note, json.dumps(names).encode())
    store, path = reach(tag / INDEX_NAME)
    with contextlib.suppress(FileNotFoundError):  # by another process
        store.rm_file(path)
    _delete_named(tag, names, note)


def finish_deletions(folder: Url) -> None:
    """Delete what deletions of tags in `folder` that were cut short have left."""
    for match in filter(None, map(_DELETING.fullmatch, _names_in(folder))):
        note = folder / match[0]
        store, path = reach(note)
        try:
            names = json.loads(store.cat_file(path))
        except FileNotFoundError:  # finished by another process
            continue
        except (OSError, ValueError) as error:
            warn_once(f"cannot read which files were to be deleted in {note} ({error}); remove it by hand")
            continue
        _delete_named(folder / match["tag"], names, note)


def _delete_named(tag: Url, names: Iterable[str], note: Url) -> None:
    """Delete those of `names` that no index of the tag names, then the note that says so."""
    try:
        store, root = reach(tag)
        ours = filter(_OURS.fullmatch, sorted({*names} - {INDEX_NAME, *_kept_in(tag)}))
        for path in [*(f"{root}/{name}" for name in ours), reach(note)[1]]:
            with contextlib.suppress(FileNotFoundError):  # by another process
                store.rm_file(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn_once(f"cannot delete all of the old checkpoint {tag} ({error}); the next save that deletes some will try")


def tidy(tag: Url) -> None:
    """Delete files of ours that the tag's index doesn't name: replaced ones, or all that a failed save has written."""
    try:
        store, root = reach(tag)
        for name in filter(_OURS.fullmatch, sorted({*_names_in(tag)} - _kept_in(tag))):
            store.rm_file(f"{root}/{name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn_once(f"cannot delete what is no longer needed in {tag} ({error}); remove it by hand")


def _kept_in(tag: Url) -> set[str]:
    """Return the names of the files that make up the checkpoint, the index included; empty where there is none."""
    store, path = reach(tag / INDEX_NAME)
    try:
        index = json.loads(store.cat_file(path))
    except FileNotFoundError:
        return set()
    return {INDEX_NAME, *(file["name"] for file in index["body"]["files"])}


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
    names = [name for name in _names_in(folder) if not name.startswith(".")]
    return [name for name in names if store.isfile(f"{root}/{name}/{INDEX_NAME}")]


def _names_in(folder: Url) -> list[str]:
    store, root = reach(folder)
    store.invalidate_cache()  # another process may have written since this one looked
    try:
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in store.ls(root, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
