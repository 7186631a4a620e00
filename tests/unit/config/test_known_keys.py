"""The table of known keys and the models say the same, and every key can be given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from craken.config import Config, load_config
from craken.config.known_keys import KNOWN_KEYS, SCHEDULE_KEYS, KnownKey, Status
from craken.config.normalise import join
from craken.config.section import Section, section_at
from craken.config.sections.memory import ActivationCheckpointing
from craken.config.sections.training import SCHEDULES


def _paths(model: type[Section], path: str = "") -> Iterator[tuple[str, type[Section], str]]:
    for name in model.model_fields:
        yield join(path, name), model, name
        nested = section_at(model, name)
        if nested:
            yield from _paths(nested, join(path, name))


SCHEMA = {path: (model, name) for path, model, name in _paths(Config)}
ALIASES = {
    join(path.rpartition(".")[0], alias): join(path.rpartition(".")[0], target)
    for path, (model, name) in SCHEMA.items()
    for alias, target in model.aliases.items()
    if target == name
}
MOVED = {f"checkpoint.{name}" for name in [*ActivationCheckpointing.model_fields, "activation_checkpointing"]}


def _is_inside_an_open_object(path: str) -> bool:
    while "." in path:
        path = path.rpartition(".")[0]
        if path in SCHEMA:
            return section_at(*SCHEMA[path]) is None
    return False


def test_every_key_of_the_models_is_in_the_table() -> None:
    assert set(SCHEMA) - set(KNOWN_KEYS) == set()


def test_every_row_of_the_table_is_a_key_of_the_models() -> None:
    rows = {path for path in KNOWN_KEYS if not _is_inside_an_open_object(path)}
    assert rows - set(SCHEMA) - set(ALIASES) - MOVED == set()


def test_aliases_of_the_table_and_of_the_models_agree() -> None:
    assert {row.path: row.alias_of for row in KNOWN_KEYS.values() if row.alias_of} == ALIASES


def test_the_schedules_of_the_table_and_of_the_models_agree() -> None:
    for name, model in SCHEDULES.items():
        assert {row.path for row in SCHEDULE_KEYS[name]} == {f"scheduler.params.{key}" for key in model.model_fields}


def _config_with(row: KnownKey) -> dict[str, Any]:
    config: Any = row.sample
    for key in reversed(row.path.replace("*", "group1").split(".")):
        config = {key: config}
    for section, name in (("optimizer", "AdamW"), ("scheduler", "WarmupLR")):
        if section in config:
            config[section].setdefault("type", name)
    if row.status is Status.STAGE_3 and row.path.startswith("zero_optimization."):
        config["zero_optimization"].setdefault("stage", 3)
    return config  # type: ignore[no-any-return]


def _at(value: Any, path: str) -> Any:
    for key in path.replace("*", "group1").split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


@pytest.mark.parametrize(
    "row", [row for row in KNOWN_KEYS.values() if row.sample is not None], ids=lambda row: row.path
)
def test_every_known_key_is_parsed(row: KnownKey) -> None:
    config = load_config(_config_with(row))
    if row.path in MOVED:
        assert config.activation_checkpointing != ActivationCheckpointing()
    elif row.path not in SCHEMA or section_at(*SCHEMA[row.path]) is None:
        assert _at(config, row.alias_of or row.path) == (_at(config, row.alias_of) if row.alias_of else row.sample)


@pytest.mark.parametrize("row", [row for row in KNOWN_KEYS.values() if row.alias_of], ids=lambda row: row.path)
def test_an_alias_sets_the_key_it_stands_for(row: KnownKey) -> None:
    model, name = SCHEMA[row.alias_of]
    value = _at(load_config(_config_with(row)), row.alias_of)
    assert value != model.model_fields[name].get_default(call_default_factory=True)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_argument_of_a_schedule_is_parsed(name: str) -> None:
    params = {row.path.rpartition(".")[2]: row.sample for row in SCHEDULE_KEYS[name]}
    config = load_config({"scheduler": {"type": name, "params": params}})
    assert config.scheduler is not None
    assert config.scheduler.params == params


@pytest.mark.parametrize(
    "path", [path for path in SCHEMA if "." not in path and KNOWN_KEYS[path].status in (Status.LATER, Status.NO_EFFECT)]
)
def test_every_top_level_key_without_effect_says_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("craken.config.load.warn_once", said.append)
    row = KNOWN_KEYS[path]
    load_config({path: row.sample})
    silent = path == "quantize_training"  # its sample switches it off
    assert len(said) == (0 if silent else 1)
    assert silent or said[0].startswith(f"configuration: {path}")


def test_every_row_says_what_its_key_does() -> None:
    assert [row.path for row in KNOWN_KEYS.values() if not row.does] == []


def test_every_key_that_the_original_was_seen_to_read_is_in_the_table() -> None:
    read = json.loads((Path(__file__).parent / "original_keys.json").read_text(encoding="utf-8"))
    known = {path.replace("*", "group1") for path in KNOWN_KEYS}
    assert len(read) > 400
    assert [path for path in read if path not in known and not path.endswith(".group1")] == []


def test_the_configuration_with_every_section_loads() -> None:
    config = load_config(Path(__file__).parent / "original_sample.json")
    assert config.hybrid_engine.enabled is config.flops_profiler.enabled is True
