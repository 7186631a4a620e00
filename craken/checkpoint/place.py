"""Where a checkpoint's files lie: a folder that this host sees, or a prefix in a remote store, named by a URL."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from craken.checkpoint.read_ahead import ReadAhead

_LOCAL_SCHEMES = ("file", "local")


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


Place = Path | Url


class OpenFile(Protocol):
    """A file open for reading at any offset, by several threads at once."""

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
    return Path(rest) if scheme in _LOCAL_SCHEMES else Url(text.rstrip("/"))


def reading_ahead(folder: Place) -> Place:
    """Return `folder` for many small reads of the files in it, which must not change meanwhile."""
    return Url(folder.text, ReadAhead()) if isinstance(folder, Url) else folder


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


def is_file(file: Place) -> bool:
    """Whether there is a file."""
    if isinstance(file, Path):
        return file.is_file()
    store, path = reach(file)
    store.invalidate_cache()
    return bool(store.isfile(path))


def open_file(file: Place) -> OpenFile:
    """Open a file for reading; FileNotFoundError when there is none, at the latest at the first read."""
    return _LocalFile(file) if isinstance(file, Path) else _RemoteFile(file)


def reach(url: Url) -> tuple[Any, str]:
    """Return the fsspec file system that a URL lies in, and its path there; ImportError naming a missing package."""
    import fsspec  # 60 ms, for those who use a store

    store, path = fsspec.core.url_to_fs(str(url))
    return store, path


class _LocalFile:
    """A file descriptor."""

    def __init__(self, file: Path) -> None:
        self._fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, into: memoryview, start: int) -> int:
        return os.preadv(self._fd, [into], start)

    def close(self) -> None:
        os.close(self._fd)


class _RemoteFile:
    """Requests for ranges, each on its own where nothing is read ahead."""

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
