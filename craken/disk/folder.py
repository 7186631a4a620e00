"""The folder that the user names: checked before it is relied on, and files made in it that leave no trace.

A file loses its name as soon as it is open. From then on it lives as long as this process holds it: the kernel gives
its space back at exit, after SIGKILL and after a power cut alike, nobody can delete it by accident, and there is
nothing to clean up. `df` shows its bytes, `ls` does not; `lsof +L1` says who holds them.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from contextlib import closing
from pathlib import Path

from craken.disk.settings import ALIGNMENT_BYTES
from craken.disk.transfer import OpenFile
from craken.log import rank, warn_once

_MANY_FILES = 1 << 16
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)  # of a file system that has no direct I/O


def check_folder(folder: Path) -> bool:
    """Make `folder` unless it exists, write and read a block in it, and return whether that worked as direct I/O.

    OSError says what is wrong with it.
    """
    if not hasattr(os, "posix_fallocate"):
        raise NotImplementedError("offload to a disk needs Linux; offload to the host (device 'cpu') works everywhere")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_direct = takes_direct_io(folder)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(
            error.errno, f"cannot swap to {folder}: {reason}; name a folder on a local disk that you may write to"
        ) from error
    if not is_direct:
        warn_once(
            f"{folder}: its file system refuses direct I/O, so offload there goes through the page cache, which costs "
            f"memory and time; a local file system such as ext4 or XFS takes it"
        )
    return is_direct


def check_room(folder: Path, num_bytes: int) -> None:
    """OSError unless `num_bytes` are free in `folder`."""
    found = os.statvfs(folder)
    free_bytes = found.f_bavail * found.f_frsize
    if free_bytes < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free_bytes:,} bytes free, expected {num_bytes:,}: free some space there, or name a folder "
            f"on a larger disk",
        )


def create_file(folder: Path, name: str, num_bytes: int, *, is_direct: bool) -> OpenFile:
    """Return a file without a name, its `num_bytes` set aside on the disk, so that no later write can find it full."""
    try:
        check_room(folder, num_bytes)  # or the attempt would take all there is from others
        file = open_unnamed(folder, is_direct=is_direct)
        if num_bytes:
            _set_aside(file, num_bytes)
    except OSError as error:
        hint = "; raise `ulimit -n`" if error.errno == errno.EMFILE else ""
        raise OSError(
            error.errno,
            f"cannot set {num_bytes:,} bytes aside for swap file {name!r} in {folder}: {error.strerror}{hint}",
        ) from error
    return file


def takes_direct_io(folder: Path) -> bool:
    """Write and read a block in `folder`, past the page cache if that is possible, and return whether it was."""
    if hasattr(os, "O_DIRECT"):
        try:
            _try_block(open_unnamed(folder, is_direct=True))
            return True
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
    _try_block(open_unnamed(folder, is_direct=False))
    return False


def allow_many_files() -> None:
    """Raise this process's soft limit on open files, within the hard one.

    Files without names stay open, a few for each group of parameters and as many mappings; shells allow 1024.
    """
    import resource  # not everywhere, as the rest of this room is not

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _set_aside(file: OpenFile, num_bytes: int) -> None:
    try:
        os.posix_fallocate(file.fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        os.ftruncate(file.fd, num_bytes)  # a file system that cannot set space aside


def open_unnamed(folder: Path, *, is_direct: bool) -> OpenFile:
    """Return a new empty file that only this process can reach."""
    first, path = tempfile.mkstemp(prefix=f"craken-swap-{os.getpid()}-rank{rank()}-", dir=folder)
    try:
        # a second opening, because some systems make the file and only then refuse the flag
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT) if is_direct else os.dup(first)
    finally:
        os.close(first)
        os.unlink(path)
    return OpenFile(fd, is_direct=is_direct)


def _try_block(file: OpenFile) -> None:
    with closing(mmap.mmap(-1, ALIGNMENT_BYTES)) as block:
        os.pwrite(file.fd, block, 0)
        os.preadv(file.fd, [block], 0)
