"""Folders that appear whole or not at all: staged beside their place, made durable, then renamed into it.

    SAVE_DIR/.TAG.tmp-TOKEN   being written, or about to be deleted; never read; its writer holds a lock on it
    SAVE_DIR/.TAG.old-TOKEN   a whole checkpoint, set aside for the moment in which its successor takes its name
    SAVE_DIR/TAG              a whole checkpoint
    SAVE_DIR/latest           text, one tag; replaced last

A new tag comes by one rename. An existing tag is swapped with its successor in one step (`renameat2`,
RENAME_EXCHANGE); where the file system cannot, the old one is renamed aside, the new one renamed in, and a reader that
finds no TAG in between takes the one set aside. The lock tells folders left by a killed writer from those in use: the
kernel drops it with the process, and the next save deletes what is not locked.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
from pathlib import Path
from typing import NamedTuple, overload

from craken.checkpoint import remote
from craken.checkpoint.errors import CheckpointNotFound
from craken.checkpoint.index import INDEX_NAME
from craken.checkpoint.place import Place, Url, is_file, place_of, read_bytes
from craken.checkpoint.remote import StagedUrl
from craken.log import warn_once

LATEST_NAME = "latest"
_STAGED = re.compile(r"\.(?P<tag>.+)\.tmp-[0-9a-f]{16}")
_SET_ASIDE = re.compile(r"\.(?P<tag>.+)\.old-[0-9a-f]{16}")
_OURS = re.compile(rf"rank-\d{{5,}}\.safetensors|{re.escape(INDEX_NAME)}")
_NUMBER = re.compile(r"([0-9]+)")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


class StagedFolder(NamedTuple):
    """A folder being written; `lock_fd` keeps other savers from deleting it."""

    path: Path
    final: Path
    lock_fd: int


class StagedRemotely(NamedTuple):
    """The same in a remote store."""

    path: StagedUrl


Staging = StagedFolder | StagedRemotely


def check_tag(tag: str) -> None:
    """ValueError unless `tag` can name a checkpoint folder."""
    if not tag or tag != Path(tag).name or tag.startswith(".") or tag == LATEST_NAME or "\n" in tag:
        raise ValueError(
            f"tag {tag!r}: expected one folder name that does not start with '.', such as 'global_step100', and is not "
            f"{LATEST_NAME!r}"
        )


def list_tags(folder: str | os.PathLike[str]) -> list[str]:
    """Return the tags in a folder or under a URL, numbers in order; what an interrupted save set aside counts."""
    folder = place_of(folder)
    if isinstance(folder, Url):
        return sorted(remote.tags_in(folder), key=_with_numbers_in_order)
    tags = set()
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _SET_ASIDE.fullmatch(path.name)
        if (match or not path.name.startswith(".")) and _is_checkpoint(path):
            tags.add(match["tag"] if match else path.name)
    return sorted(tags, key=_with_numbers_in_order)


def _with_numbers_in_order(tag: str) -> list[tuple[int, str]]:
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(_NUMBER.split(tag))]


def has_latest(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder or a URL has a file `latest`."""
    return is_file(place_of(folder) / LATEST_NAME)


def latest_tag(folder: str | os.PathLike[str]) -> str | None:
    """Return the tag that `latest` names in a folder or at a URL; None without that file."""
    return find(place_of(folder), None)[0] if has_latest(folder) else None


@overload
def find(folder: Path, tag: str | None) -> tuple[str, Path]: ...
@overload
def find(folder: Place, tag: str | None) -> tuple[str, Place]: ...
def find(folder: Place, tag: str | None) -> tuple[str, Place]:
    """Return the tag (None: the one `latest` names) and its place; CheckpointNotFound listing what there is."""
    if not (remote.exists(folder) if isinstance(folder, Url) else folder.is_dir()):
        raise CheckpointNotFound(no_folder(folder))
    if tag is None:
        tag = _read_latest(folder)
    else:
        check_tag(tag)
    path = _path_of(folder, tag)
    if path is not None:
        return tag, path
    if isinstance(folder, Path) and (folder / tag).is_dir():
        raise CheckpointNotFound(
            f"{folder / tag} holds no {INDEX_NAME}, so it is no checkpoint of ours; {_what_exists(folder)}"
        )
    raise CheckpointNotFound(f"tag {tag!r} does not exist in {folder}; {_what_exists(folder)}")


def no_folder(folder: Place) -> str:
    """Say what is there in place of a folder with checkpoints, or of one."""
    is_file_itself = isinstance(folder, Path) and folder.exists()
    return f"checkpoint folder {folder} {'is a file' if is_file_itself else 'does not exist'}"


def _path_of(folder: Place, tag: str) -> Place | None:
    """Return where the checkpoint of a tag is, which a kill may have left set aside; None if there is none."""
    aside = sorted(folder.glob(f".{_escaped(tag)}.old-*")) if isinstance(folder, Path) else []
    return next((path for path in (folder / tag, *aside) if is_file(path / INDEX_NAME)), None)


def _what_exists(folder: Place) -> str:
    tags = list_tags(folder)
    return f"tags that exist in it: {', '.join(tags)}" if tags else "no checkpoint exists in it"


def stage(folder: Place, tag: str) -> Staging:
    """Create `folder` if need be, delete what killed savers left in it, and return a new staging folder for `tag`."""
    return StagedRemotely(remote.stage(folder / tag)) if isinstance(folder, Url) else stage_folder(folder, tag)


def stage_folder(folder: Path, tag: str) -> StagedFolder:
    """Return a new staging folder for `folder`/`tag`, on a file system of this host's."""
    final = folder / tag
    if final.exists() and not _is_checkpoint(final) and not _is_empty_folder(final):
        raise ValueError(
            f"{final} exists and holds no {INDEX_NAME}: it is no checkpoint of ours; remove it or choose a tag"
        )
    _make_folders(folder)
    _tidy(folder)
    path = folder / f".{tag}.tmp-{secrets.token_hex(8)}"
    path.mkdir()
    lock_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        warn_once(f"{folder} cannot lock folders ({error}); leftovers of killed saves will have to be removed by hand")
    return StagedFolder(path, final, lock_fd)


def publish(staging: Staging) -> None:
    """Give the finished staging folder its name, in place of a checkpoint that may have it, durably.

    What others have put into that checkpoint's folder is in the new one too.
    """
    if isinstance(staging, StagedRemotely):
        remote.publish(staging.path)
        return
    path, final = staging.path, staging.final
    if _is_checkpoint(final):
        _keep_others_files(final, path)
    sync_folder(path)
    if not _is_checkpoint(final):
        path.rename(final)
    elif not _exchange(path, final):
        _replace_in_steps(path, final)
    sync_folder(final.parent)


def discard(staging: Staging) -> None:
    """Delete what lies under the staging name (an unfinished folder, or the one just replaced); unlock it."""
    if isinstance(staging, StagedRemotely):
        remote.tidy(staging.path.tag)
        return
    _delete(staging.path)
    os.close(staging.lock_fd)


def delete_tag(path: Place) -> None:
    """Delete the checkpoint `path`, which first loses its name, in a store its index: cut short, no half is left.

    The rest of a folder goes with the next save then, in a store with the next one that deletes checkpoints.
    """
    if isinstance(path, Url):
        remote.delete_tag(path)
        return
    path = path.rename(path.with_name(f".{path.name}.tmp-{secrets.token_hex(8)}"))
    sync_folder(path.parent)
    _delete(path)


def finish_deletions(folder: Place) -> None:
    """Delete what deletions that were cut short have left in a store; in folders `stage` does."""
    if isinstance(folder, Url):
        remote.finish_deletions(folder)


def write_durably(path: Place, text: str) -> None:
    """Write `text` to `path` and fsync it."""
    if isinstance(path, Url):
        remote.write(path, text.encode())
        return
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def move_latest(folder: Place, tag: str) -> None:
    """Let `latest` name `tag`: atomically and durably."""
    if isinstance(folder, Url):
        remote.write(folder / LATEST_NAME, f"{tag}\n".encode())
        return
    path = folder / f".{LATEST_NAME}.tmp-{secrets.token_hex(8)}"
    try:
        write_durably(path, tag + "\n")
        path.replace(folder / LATEST_NAME)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_latest(folder: Place) -> str:
    path = folder / LATEST_NAME
    if not is_file(path):
        raise CheckpointNotFound(f"{path} does not exist, so a tag must be given; {_what_exists(folder)}")
    try:
        tag = read_bytes(path).decode("utf-8").strip()
        check_tag(tag)
    except ValueError as error:
        raise CheckpointNotFound(f"{path} is damaged ({error}); give a tag; {_what_exists(folder)}") from error
    if _path_of(folder, tag) is None:
        raise CheckpointNotFound(f"{path} names the tag {tag!r}, which does not exist; {_what_exists(folder)}")
    return tag


def _is_checkpoint(path: Path) -> bool:
    return (path / INDEX_NAME).is_file()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _escaped(tag: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", tag)


def _make_folders(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _replace_in_steps(path: Path, final: Path) -> None:
    """Swap the names by three renames; in between, the old checkpoint is found under its set-aside name."""
    aside = _as(path, "old")
    final.rename(aside)
    try:
        path.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    aside.rename(path)


def _keep_others_files(source: Path, target: Path) -> None:
    """Give all in `source` that no save has written a name in `target` too, without a copy where that can be."""
    for path in source.iterdir():
        if _OURS.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, target / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, target / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # the file system has no second names
        shutil.copy2(source, target, follow_symlinks=False)


def _as(path: Path, state: str) -> Path:
    """Return the sibling of the hidden folder `path` with the same token and another state ("tmp" or "old")."""
    stem, token = path.name.rsplit("-", 1)
    return path.with_name(f"{stem[:-3]}{state}-{token}")


def _tidy(folder: Path) -> None:
    """Put back the only copy of a tag; delete other copies set aside, and staging folders that nobody locks."""
    for path in list(folder.iterdir()):
        set_aside, staged = _SET_ASIDE.fullmatch(path.name), _STAGED.fullmatch(path.name)
        if set_aside and not (folder / set_aside["tag"]).exists():
            path.rename(folder / set_aside["tag"])
        elif set_aside:
            _delete(path.rename(_as(path, "tmp")))
        elif staged and _is_abandoned(path):
            _delete(path)


def _is_abandoned(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if path.exists():
        warn_once(f"cannot delete {path}, which is no longer needed; remove it by hand")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if _renameat2 is None:
        return False
    done = _renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
