"""Where a checkpoint's files lie: a folder that this host sees, or a prefix in a remote store, named by a URL."""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from craken.checkpoint.read_ahead import ReadAhead
from craken.disk import read_direct

_LOCAL_SCHEMES = ("file", "local")
_DIRECT_BYTES = 1 << 20  # smaller reads are faster through the page cache, which reads ahead


@dataclass(frozen=True)
class Url(os.PathLike[str]):
    """A prefix or a file in a store that fsspec reaches, used as a Path is: `url / name`, `url.name`, `str(url)`.

    `ahead` keeps what was read ahead of the files below it, for a reader of files that do not change.
    """

    text: str
    ahead: ReadAhead | None = field(default=None, compare=False, repr=False)

    def __truediv__(self, name: str) -> Url:
        return replace(self, text=f"{self.text}/{name}")

    def __str__(self) -> str:
        return self.text

    def __fspath__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Url:
        """What the last part lies in."""
        scheme, _, rest = self.text.partition("://")
        return Url(f"{scheme}://{rest.rpartition('/')[0]}")


Place = Path | Url


class OpenFile(Protocol):
    """A file open for reading at any offset, by several threads at once, at best `part_bytes` a call."""

    part_bytes: int

    def read_into(self, into: memoryview, start: int) -> int:
        """Fill the beginning of `into` with bytes from `start` on; return how many, 0 at the end of the file."""

    def close(self) -> None:
        """Let go of the file."""


def place_of(folder: str | os.PathLike[str]) -> Place:
    """Return the place that `folder` names: SCHEME://... is a URL, and with `file` or `local` a path of this host."""
    text = os.fspath(folder)
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return Path(text)
    return Path(rest) if scheme in _LOCAL_SCHEMES else Url(f"{scheme}://{rest.rstrip('/')}")


def host_path(folder: str | os.PathLike[str]) -> Path:
    """Return the path of this host that `folder` names; ValueError for the URL of a store."""
    place = place_of(folder)
    if isinstance(place, Url):
        raise ValueError(f"{place}: expected a folder of this host; in stores there are checkpoints of ours alone")
    return place.expanduser()


def reading_ahead(folder: Place, num_files: int) -> Place:
    """Return `folder` for many small reads of `num_files` files in it, which must not change meanwhile."""
    return Url(folder.text, ReadAhead(num_files)) if isinstance(folder, Url) else folder


def read_bytes(file: Place) -> bytes:
    """Return a whole file; FileNotFoundError when there is none."""
    if isinstance(file, Path):
        return file.read_bytes()
    store, path = reach(file)
    return bytes(store.cat_file(path))


def num_bytes_of(file: Place) -> int:
    """Return the size of a file; FileNotFoundError when there is none."""
    if isinstance(file, Path):
        return file.stat().st_size
    store, path = reach(file)
    store.invalidate_cache()  # another process may have written since this one looked
    return int(store.size(path))


def modified_ns(file: Place) -> int:
    """Return when a file was written, in nanoseconds; 0 where a store does not tell."""
    if isinstance(file, Path):
        return file.stat().st_mtime_ns
    store, path = reach(file)
    try:
        return int(store.modified(path).timestamp() * 1e9)
    except NotImplementedError:
        return 0


def is_file(file: Place) -> bool:
    """Whether there is a file."""
    if isinstance(file, Path):
        return file.is_file()
    store, path = reach(file)
    store.invalidate_cache()
    return bool(store.isfile(path))


def open_file(file: Place, *, is_shared: bool = False) -> OpenFile:
    """Open a file for reading; FileNotFoundError when there is none, at the latest at the first read.

    is_shared: other processes of this host read the same bytes, so that the page cache saves the disk all but one time.
    """
    return _LocalFile(file, is_direct=not is_shared) if isinstance(file, Path) else _RemoteFile(file)


def reach(url: Url) -> tuple[Any, str]:
    """Return the fsspec file system that a URL lies in, and its path there; ValueError for a store it cannot reach."""
    import fsspec  # 60 ms, for those who use a store

    try:
        store, path = fsspec.core.url_to_fs(str(url))
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from error  # an unknown scheme, or a package to install
    return store, path


class _LocalFile:
    """Large parts come past the page cache, where the file system takes that, small ones through it."""

    part_bytes = 2 << 20  # a part is checked while the next ones come

    def __init__(self, file: Path, *, is_direct: bool) -> None:
        self._fd, self._direct_fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC), -1
        if is_direct:
            with contextlib.suppress(OSError, AttributeError):  # not every system, and not every file system, has it
                self._direct_fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        self._is_direct = self._direct_fd >= 0

    def read_into(self, into: memoryview, start: int) -> int:
        if self._is_direct and len(into) >= _DIRECT_BYTES:
            try:
                read_direct(self._direct_fd, into, start)
                return len(into)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._is_direct = False
        return os.preadv(self._fd, [into], start)

    def close(self) -> None:
        os.close(self._fd)
        if self._direct_fd >= 0:
            os.close(self._direct_fd)


class _RemoteFile:
    """Requests for ranges, each on its own where nothing is read ahead."""

    part_bytes = 1 << 30  # blocks whole: each request costs a round trip

    def __init__(self, file: Url) -> None:
        self._store, self._path = reach(file)
        self._ahead = file.ahead

    def read_into(self, into: memoryview, start: int) -> int:
        if self._ahead is None:
            data = self._fetch(start, start + len(into))
        else:
            data = self._ahead.read(self._path, start, len(into), self._fetch)
        into[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Nothing is held."""

    def _fetch(self, start: int, end: int) -> bytes:
        return bytes(self._store.cat_file(self._path, start=start, end=end))
