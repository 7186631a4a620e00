"""Where a configuration comes from, and what is said when there is none."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from craken.config import Config, load_config

CONFIG = {"train_batch_size": 8, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}


def _file(folder: Path, text: str) -> Path:
    path = folder / "ds_config.json"
    path.write_text(text, encoding="utf-8")
    return path


def _error(source: Any) -> str:
    with pytest.raises(ValueError, match="configuration") as caught:
        load_config(source)
    return str(caught.value)


def test_a_dict_is_kept_as_the_very_same_object() -> None:
    given = {**CONFIG, "fp16": {"enabled": "auto"}, "own": {"key": [1]}}
    before = json.dumps(given)
    config = load_config(given)
    assert config.raw is given
    assert json.dumps(given) == before


def test_a_path_can_be_a_text_or_a_path_object(tmp_path: Path) -> None:
    path = _file(tmp_path, json.dumps(CONFIG))
    for source in (path, str(path)):
        config = load_config(source)
        assert config.zero_optimization.stage == 1
        assert config.raw == CONFIG


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    assert load_config(_file(tmp_path, "\ufeff" + json.dumps(CONFIG))).train_batch_size == 8


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_text_is_decoded(encode: Any) -> None:
    long = {**CONFIG, "note": "ÿþ?>" * 200}  # forces + and /, and is longer than a file name can be
    config = load_config(encode(json.dumps(long, ensure_ascii=False).encode()).decode())
    assert config.raw == long


def test_base64_without_padding_is_decoded() -> None:
    text = base64.urlsafe_b64encode(json.dumps({"train_batch_size": 128}).encode()).decode()
    assert text.endswith("=")
    assert load_config(text.rstrip("=")).train_batch_size == 128


def test_a_config_is_returned_unchanged() -> None:
    config = load_config(CONFIG)
    assert isinstance(config, Config)
    assert load_config(config) is config


def test_a_missing_file_is_named() -> None:
    assert "configuration no/such/file.json: expected a path to an existing JSON file" in _error("no/such/file.json")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert "expected a JSON file, got a folder; name the file inside it" in _error(tmp_path)


def test_json_text_is_told_to_be_parsed_first() -> None:
    assert "got JSON text; pass json.loads(text)" in _error('{"train_batch_size": 8}')


@pytest.mark.parametrize("source", [3, None, ["a"]])
def test_another_type_is_named(source: Any) -> None:
    assert f"got {type(source).__name__}" in _error(source)


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ('{\n "a": 1,\n}', "line 3, column 1", "remove the comma before the closing bracket"),
        ('{\n "a": True\n}', "line 2, column 7", "JSON writes true, false and null"),
        ("{'a': 1}", "line 1, column 2", "double quotes"),
        ('{\n// note\n"a": 1}', "line 2, column 1", "JSON has no comments"),
        ("", "line 1, column 1", "the file is empty"),
        ('{"a" 1}', "line 1, column 6", "delimiter"),
    ],
)
def test_broken_json_is_located_and_explained(tmp_path: Path, text: str, where: str, hint: str) -> None:
    path = _file(tmp_path, text)
    message = _error(path)
    assert message.startswith(f"configuration {path}: expected JSON, got a syntax error at {where}")
    assert hint in message


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    assert 'got "stage" twice in one object; keep one' in _error(
        _file(tmp_path, '{"zero_optimization": {"stage": 1, "stage": 2}}')
    )


@pytest.mark.parametrize(("text", "kind"), [("[1]", "a list"), ("null", "null"), ("3", "the value 3")])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    assert f'expected a JSON object such as {{"train_batch_size": 8}}, got {kind}' in _error(_file(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00{")
    assert "expected a readable JSON file" in _error(path)


def test_the_report_names_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"train_batch_size": 0}')
    assert _error(path) == f"configuration {path}: train_batch_size: expected a whole number >= 1, got 0"
