"""Finds the text to train on and decides, by a hash of each file's name, which files are held out for validation."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules", "build", "dist"})
LIBRARY_SUFFIXES = frozenset({".py", ".txt", ".rst", ".md"})
MAX_FILE_BYTES = 16 * 2**20
HELD_OUT_ONE_IN = 50  # files, about 2 %
HELD_OUT_TAIL = 0.05  # of the text, where there is only one file


class TextFile(NamedTuple):
    """One file of text: `name` is its path relative to the root it was found under, with forward slashes."""

    name: str
    path: Path
    size_bytes: int
    mtime_ns: int


class Document(NamedTuple):
    name: str
    text: str
    is_held_out: bool


def find_files(data: Path | None) -> list[TextFile]:
    """Return the text files under `data` (a folder or a file; None: Python's own library and documentation), by name.

    Raises ValueError when `data` does not exist or holds no file.
    """
    if data is None:
        return _standard_library()
    if not data.exists():
        raise ValueError(f"--data {data} does not exist; give a folder or a file of text, or leave --data out")
    root = data.resolve()  # however it is spelt, it is the same text
    if root.is_file():
        return [_text_file(root, root.parent)]
    files = sorted(_walk(root, suffixes=None))
    if not files:
        raise ValueError(f"--data {data} holds no files; expected a folder with text files (UTF-8) in it")
    return files


def read_documents(files: list[TextFile]) -> Iterator[Document]:
    """Yield the files that are valid UTF-8 text, each marked as training or held-out text; others are passed over."""
    if len(files) == 1:
        yield from _split_single(files[0])
        return
    held_out = held_out_names(files)
    for file in files:
        text = _read_text(file.path)
        if text:
            yield Document(file.name, text, file.name in held_out)


def held_out_names(files: list[TextFile]) -> set[str]:
    """Return the names of the held-out files: those whose hash falls in one class of fifty, at least one in all."""
    chosen = {file.name for file in files if name_hash(file.name) % HELD_OUT_ONE_IN == 0}
    return chosen or {min((file.name for file in files), key=name_hash)}


def name_hash(name: str) -> int:
    """Return a number that depends on `name` alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def fingerprint(files: list[TextFile]) -> str:
    """Return a hash over every file's name, size and modification time."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.name}\0{file.path.parent}\0{file.size_bytes}\0{file.mtime_ns}\n".encode())
    return digest.hexdigest()


def _standard_library() -> list[TextFile]:
    library = Path(sysconfig.get_paths()["stdlib"])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    documentation = [Path(sys.base_prefix) / "share/doc" / version, Path("/usr/share/doc") / version]
    roots = dict.fromkeys(path.resolve() for path in (library, *documentation) if path.is_dir())
    files = sorted(file for root in roots for file in _walk(root, suffixes=LIBRARY_SUFFIXES))
    if not any(file.name.endswith(".py") for file in files):
        raise ValueError(
            f"this Python has no sources of its library under {library}; name some text with --data FOLDER"
        )
    return files


def _walk(root: Path, *, suffixes: frozenset[str] | None) -> Iterator[TextFile]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS and name[0] != ".")
        for name in sorted(names):
            path = Path(folder, name)
            if name[0] == "." or (suffixes is not None and path.suffix not in suffixes) or not path.is_file():
                continue
            file = _text_file(path, root)
            if 0 < file.size_bytes <= MAX_FILE_BYTES:
                yield file


def _text_file(path: Path, root: Path) -> TextFile:
    status = path.stat()
    return TextFile(path.relative_to(root).as_posix(), path, status.st_size, status.st_mtime_ns)


def _read_text(path: Path) -> str:
    """Return the file's text, or nothing where it is not text: no valid UTF-8, a zero byte, not readable."""
    try:
        text = path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return ""
    return "" if "\0" in text else text


def _split_single(file: TextFile) -> Iterator[Document]:
    text = _read_text(file.path)
    cut = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT_TAIL))) + 1
    if cut:
        yield Document(file.name, text[:cut], False)
        yield Document(file.name, text[cut:], True)
