"""Which files are read, which are held out, and what is said when there is nothing to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from craken.train import corpus


def _folder(root: Path, num_files: int) -> Path:
    for number in range(num_files):
        file = root / f"part{number % 3}" / f"file{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of file {number}\n" * 3, "utf-8")
    return root


def test_about_two_percent_of_many_files_are_held_out_by_name_alone(tmp_path) -> None:
    files = corpus.find_files(_folder(tmp_path, 600))
    held_out = corpus.held_out_names(files)
    assert 4 <= len(held_out) <= 24
    moved = [file._replace(path=Path("/elsewhere") / file.name, mtime_ns=0) for file in reversed(files)]
    assert corpus.held_out_names(moved) == held_out


def test_a_small_folder_holds_out_one_file_and_trains_on_the_others(tmp_path) -> None:
    documents = list(corpus.read_documents(corpus.find_files(_folder(tmp_path, 4))))
    assert sorted(document.is_held_out for document in documents) == [False, False, False, True]


def test_a_single_file_holds_out_its_last_lines(tmp_path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {number}\n" for number in range(1000)), "utf-8")
    train, held_out = corpus.read_documents(corpus.find_files(file))
    assert train.text + held_out.text == file.read_text("utf-8")
    assert held_out.is_held_out
    assert 0.04 < len(held_out.text) / len(train.text) < 0.06
    assert held_out.text.startswith("line ")


def test_files_that_are_no_text_are_passed_over(tmp_path) -> None:
    _folder(tmp_path, 3)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "zeros.txt").write_bytes(b"a\0b")
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "cached.txt").write_text("cached")
    names = {document.name for document in corpus.read_documents(corpus.find_files(tmp_path))}
    assert names == {"part0/file0.txt", "part1/file1.txt", "part2/file2.txt"}


def test_the_standard_library_is_found_without_installed_packages() -> None:
    files = corpus.find_files(None)
    names = {file.name for file in files}
    assert {"ast.py", "json/decoder.py", "pydoc_data/topics.py"} <= names
    assert not any("site-packages" in name for name in names)
    assert sum(file.size_bytes for file in files) > 5e6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: root / "missing", "does not exist"),
        (lambda root: root, "holds no files"),
    ],
)
def test_a_place_without_files_is_named(tmp_path, make, words) -> None:
    with pytest.raises(ValueError, match=words):
        corpus.find_files(make(tmp_path))


def test_the_fingerprint_changes_with_a_file_and_not_without(tmp_path) -> None:
    _folder(tmp_path, 5)
    before = corpus.fingerprint(corpus.find_files(tmp_path))
    assert corpus.fingerprint(corpus.find_files(tmp_path)) == before
    (tmp_path / "part0" / "file0.txt").write_text("other text")
    assert corpus.fingerprint(corpus.find_files(tmp_path)) != before
