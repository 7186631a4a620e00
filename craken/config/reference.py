"""Writes the reference page of the configuration from the table of known keys: `python -m craken.config.reference`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from craken.config.known_keys import KNOWN_KEYS, SCHEDULE_KEYS, KnownKey, Status
from craken.config.schema import Config
from craken.config.section import Section, section_at

PAGE = Path("docs/config.md")

INTRODUCTION = """# The configuration

One JSON object says how to train. It can be a dict, a path to a JSON file, or the JSON as base64 text:

```python
engine, optimizer, loader, scheduler = deepspeed.initialize(model=model, config="ds_config.json")
```

```json
{
  "train_batch_size": 64,
  "gradient_accumulation_steps": 8,
  "gradient_clipping": 0.3,
  "bf16": {"enabled": true},
  "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7},
  "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
  "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}
}
```

The whole object is checked before anything starts. `craken config FILE --world-size N` and
`craken.check_config(config, num_ranks)` do only that.

- A key that is absent, `null` or `"auto"` has its default.
- A float without fraction is a whole number: `5e8`. Numbers and flags stand without quotes.
- Sizes are in elements unless the key says otherwise; bucket sizes and the like are ceilings.
- An unknown key inside a section is an error. At the top level it is an error when it looks like a slip of a known key,
  and else it is left alone with one warning: programs may keep keys of their own there.
- A key that has no effect here says so once, when its value is not the default.

## Batch sizes

`train_batch_size` = `train_micro_batch_size_per_gpu` x `gradient_accumulation_steps` x data-parallel ranks. Any two of
the three keys give the third; with one of the first two alone, a step has one micro-batch.

## Errors

All problems are named at once, each with its key, what was expected, what came, and what to type instead:

```text
{errors}
```
"""

WRONG: dict[str, Any] = {
    "train_batchsize": 64,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8", "offload_param": {"device": "cpu"}},
}

MEANINGS = {
    Status.WORKS: "has the effect described",
    Status.ALWAYS: "what the key asks for is always the case here",
    Status.STAGE_3: "read when `zero_optimization.stage` is 3",
    Status.OFFLOAD: "read when something is offloaded",
    Status.LATER: "parsed and checked; what happens meanwhile is described",
    Status.NO_EFFECT: "parsed and checked; the reason is described",
}


def render() -> str:
    """Return the whole page."""
    parts = [INTRODUCTION.replace("{errors}", _example_error()), "## Keys\n", _statuses()]
    rows = [row for row in KNOWN_KEYS.values() if not _is_section(row)]
    sections: dict[str, list[KnownKey]] = {
        _section_of(row): [] for row in KNOWN_KEYS.values()
    }  # in the order of the table
    for row in rows:
        sections[_section_of(row)].append(row)
    parts += [_section(path, members) for path, members in sections.items() if members]
    parts += [_section("scheduler.params", members, f" of {name}") for name, members in SCHEDULE_KEYS.items()]
    return "\n".join(parts)


def _example_error() -> str:
    from craken.config.load import load_config

    try:
        load_config(WRONG)
    except ValueError as error:
        return str(error)
    raise AssertionError("the example of a wrong configuration is right")


def _statuses() -> str:
    lines = [f"- *{status.value}*: {meaning}" for status, meaning in MEANINGS.items()]
    return "\n".join(["The last column of the tables:", "", *lines, ""])


def _section_of(row: KnownKey) -> str:
    """Return the heading a key stands under: its section, or the outermost one that says the same of all its keys."""
    keys = row.path.split(".")
    for depth in range(1, len(keys)):
        outer = KNOWN_KEYS.get(".".join(keys[:depth]))
        if outer and (outer.does, outer.status) == (row.does, row.status):
            return outer.path
    return ".".join(keys[:-1])


def _is_section(row: KnownKey) -> bool:
    field = _field(row.path)
    return field is not None and section_at(*field) is not None


def _field(path: str) -> tuple[type[Section], str] | None:
    """Return the model and attribute name of a key, or None when no model holds it."""
    model: type[Section] = Config
    *sections, name = path.split(".")
    for section in sections:
        nested = section_at(model, section) if section in model.model_fields else None
        if nested is None:
            return None
        model = nested
    return (model, name) if name in model.model_fields else None


def _section(path: str, rows: list[KnownKey], of: str = "") -> str:
    heading = f"### `{path}`{of}" if path else "### Top level"
    known = KNOWN_KEYS.get(path)
    lines = [heading, ""]
    if known and all(row.does == known.does and row.status is known.status for row in rows):
        names = ", ".join(_name(row, path) for row in rows)
        return "\n".join([*lines, f"*{known.status.value}*: {known.does}. Keys: {names}.", ""])
    lines += ["| key | default | example | what it does | |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(_line(row, path) for row in rows), ""])


def _name(row: KnownKey, section: str) -> str:
    """Return the key's name inside `section`, with the key it is an alias of."""
    start = len(section) + 1 if section else 0
    return f"`{row.path[start:]}`" + (f" (= `{row.alias_of[start:]}`)" if row.alias_of else "")


def _line(row: KnownKey, section: str) -> str:
    does = "another spelling" if row.alias_of else row.does
    return f"| {_name(row, section)} | {_default(row)} | {_code(row.sample)} | {does} | *{row.status.value}* |"


def _default(row: KnownKey) -> str:
    field = _field(row.path)
    if field is None:
        return ""
    value = field[0].model_fields[field[1]].get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value in ({}, [], ""):
        return ""
    return "no limit" if value == sys.maxsize else _code(value)


def _code(value: Any) -> str:
    if value is None:
        return ""
    is_round = isinstance(value, (int, float)) and value >= 100_000 and value % 100_000 == 0
    return f"`{value:g}`".replace("e+0", "e") if is_round else f"`{json.dumps(value)}`"


def main() -> None:
    """Write the page to the path given, `docs/config.md` by default."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
