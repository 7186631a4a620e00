"""The reference page says what the table of known keys says."""

from __future__ import annotations

from pathlib import Path

from craken.config.known_keys import KNOWN_KEYS
from craken.config.reference import PAGE, render

ROOT = Path(__file__).parents[3]


def test_the_page_is_current() -> None:
    written = (ROOT / PAGE).read_text(encoding="utf-8")
    assert written == render(), f"run: python -m craken.config.reference {PAGE}"


def test_every_key_stands_on_the_page() -> None:
    page = render()
    names = {row.path: row.path.rpartition(".")[2] for row in KNOWN_KEYS.values()}
    assert [path for path, name in names.items() if f"{name}`" not in page and f"{name}." not in page] == []


def test_the_page_shows_an_error_as_it_is_raised() -> None:
    assert 'train_batchsize: expected a known key, got an unknown one; did you mean "train_batch_size"?' in render()
