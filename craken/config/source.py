"""Reads the JSON object of a configuration from a dict, a file or a base64 text."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    """The user's JSON object and the words that say where it came from ("" for a dict)."""

    data: Mapping[str, Any]
    origin: str


class _DuplicateKey(ValueError):
    """A JSON object names a key twice."""


def read_source(source: str | os.PathLike[str] | Mapping[str, Any]) -> Source:
    """Return the JSON object that `source` is or leads to; ValueError when there is none."""
    if isinstance(source, Mapping):
        return Source(source, "")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"configuration: expected a dict, a path to a JSON file or a base64 text, got {type(source).__name__}"
        )
    path = Path(source)
    if _is_file(path):
        return Source(_parse(_read(path), str(path)), str(path))
    decoded = _from_base64(source) if isinstance(source, str) else None
    if decoded is not None:
        return Source(_parse(decoded, "in base64"), "in base64")
    raise ValueError(_explain_missing(source, path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a long base64 text is no legal file name
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {path}: expected a readable JSON file, got: {error}") from error


def _from_base64(text: str) -> str | None:
    """Return the JSON text inside `text`, or None when it holds none."""
    try:
        standard = text.strip().replace("-", "+").replace("_", "/")
        decoded = base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if error.lineno <= len(text.splitlines()) else ""
        raise ValueError(
            f"configuration {origin}: expected JSON, got a syntax error at line {error.lineno}, column {error.colno}: "
            f"{error.msg}{_json_hint(text, error)}" + (f"\n  {line}" if line else "")
        ) from error
    except _DuplicateKey as error:
        raise ValueError(
            f"configuration {origin}: expected every key once, got {error} twice in one object; keep one"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(
            f'configuration {origin}: expected a JSON object such as {{"train_batch_size": 8}}, got {_kind(data)}'
        )
    return data


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    """Say what to type instead, for the mistakes that are made most often."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if not text.strip():
        return "; the file is empty"
    if before.endswith(",") and after[:1] in ("}", "]", '"', ""):
        return "; remove the comma before the closing bracket"
    if after.startswith(("True", "False", "None")):
        return "; JSON writes true, false and null"
    if after.startswith("'"):
        return '; JSON puts texts in double quotes, "like this"'
    if after.startswith(("//", "#", "/*")):
        return "; JSON has no comments"
    return ""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKey(f'"{key}"')
        found[key] = value
    return found


def _kind(data: object) -> str:
    if isinstance(data, list):
        return "a list"
    return "null" if data is None else f"the value {json.dumps(data)}"


def _explain_missing(source: str | os.PathLike[str], path: Path) -> str:
    text = str(source)
    text = text if len(text) <= 80 else text[:77] + "..."
    if path.is_dir():
        return f"configuration {text}: expected a JSON file, got a folder; name the file inside it"
    if text.lstrip().startswith("{"):
        return "configuration: expected a dict, a path or a base64 text, got JSON text; pass json.loads(text)"
    return f"configuration {text}: expected a path to an existing JSON file, got no such file (looked in {Path.cwd()})"
