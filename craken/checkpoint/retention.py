"""Which checkpoints of a folder are the newest, and which may go.

A checkpoint's age is the modification time of its index, the last file written before the folder got its name; copies
that keep times (`cp -a`, `rsync -a`) keep the order. A checkpoint whose index is damaged, or with a file that is
missing or of another size, counts for nothing: it takes no place among those that are kept.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from craken.checkpoint import folder as folders
from craken.checkpoint.blocks import size_problem
from craken.checkpoint.errors import CheckpointDamaged, CheckpointNotFound
from craken.checkpoint.index import INDEX_NAME, Index, read_index
from craken.checkpoint.place import Place, Url, modified_ns, place_of
from craken.checkpoint.verifier import verify
from craken.log import warn_once


def newest_first(folder: str | os.PathLike[str]) -> list[str]:
    """Return the tags in a folder or under a URL in the order in which they were saved, the last one first.

    None where there is no folder. Where a store tells no times, the numbers in tags count.
    """
    place, times = place_of(folder), {}
    for tag in folders.list_tags(place)[::-1]:  # numbers in order: for those whose times are equal
        with contextlib.suppress(FileNotFoundError):  # deleted by another process since
            times[tag] = modified_ns(_listed(place, tag) / INDEX_NAME)
    return sorted(times, key=lambda tag: -times[tag])


class Found(NamedTuple):
    """The newest whole checkpoint (None: there is none), and what is wrong with each newer one, by tag."""

    tag: str | None
    damaged: dict[str, str]


def newest_whole(folder: str | os.PathLike[str]) -> Found:
    """Read checkpoints in a folder or under a URL in full, the newest first, until every byte of one is right."""
    place = place_of(folder)
    damaged: dict[str, str] = {}
    for tag in newest_first(place):
        try:
            damage = [item.reason for item in verify(folders.find(place, tag)[1])]
        except (ValueError, OSError) as error:  # a newer release's; or nobody can read it
            damage = [str(error)]
        if not damage:
            return Found(tag, damaged)
        damaged[tag] = damage[0] + (f" (and {len(damage) - 1} more like it)" if damage[1:] else "")
    return Found(None, damaged)


def delete_older(folder: Place, *, keep_last: int) -> None:
    """Delete the checkpoints in `folder` that are older than its `keep_last` newest whole ones.

    Never that which `latest` names, nor folders that are no checkpoints or of a newer format. A deletion that a kill
    cuts short leaves no half of a checkpoint under a tag: the folder loses its name first; what is left goes with the
    next one. What cannot be looked at or deleted is a warning.
    """
    try:
        _delete_older(folder, keep_last)
    except OSError as error:  # the new checkpoint is on the disk: that has worked
        warn_once(f"cannot look for old checkpoints in {folder} ({error}); remove them by hand")


def _delete_older(folder: Place, keep_last: int) -> None:
    folders.finish_deletions(folder)
    named, num_whole = _named_by_latest(folder), 0
    for tag in newest_first(folder):
        try:
            path = _listed(folder, tag)
            index = _index_in(path)
        except (ValueError, CheckpointNotFound):  # a newer release's; or deleted by another process since
            continue
        if num_whole < keep_last:
            num_whole += index is not None and all(size_problem(path, file) is None for file in index.files)
        elif tag != named:
            _delete(path)


def _listed(folder: Place, tag: str) -> Place:
    """Return where a tag is that was just listed; a store is not asked again."""
    return folder / tag if isinstance(folder, Url) else folders.find(folder, tag)[1]


def _delete(path: Place) -> None:
    try:
        folders.delete_tag(path)
    except FileNotFoundError:  # by another process
        return
    except OSError as error:
        warn_once(f"cannot delete the old checkpoint {path} ({error}); remove it by hand")


def _index_in(path: Place) -> Index | None:
    """Return the index; None for a damaged one, ValueError for a newer format, CheckpointNotFound if it has gone."""
    try:
        return read_index(path)
    except CheckpointDamaged as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointNotFound(f"{path} was deleted since") from error
        return None


def _named_by_latest(folder: Place) -> str | None:
    try:
        return folders.find(folder, None)[0]
    except CheckpointNotFound:
        return None
