"""Says which settings of a configuration change nothing here, from the table of known keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from craken.config.known_keys import KNOWN_KEYS, Status
from craken.config.normalise import join
from craken.config.problems import shown
from craken.config.schema import Config
from craken.config.section import Section


def notices(config: Config, known: Mapping[str, Any]) -> list[str]:
    """Return one line for each key in `known` that differs from its default and has no effect.

    A section without effect gives one line, and none when it is switched off.
    """
    return list(_notices(config, known, ""))


def _notices(section: Section, known: Mapping[str, Any], path: str) -> Iterator[str]:
    for name in known:
        here, value = join(path, name), getattr(section, name)
        if value == type(section).model_fields[name].get_default(call_default_factory=True) or is_off(value):
            continue
        row = KNOWN_KEYS[here]
        if row.status in (Status.LATER, Status.NO_EFFECT):
            setting = (
                here if isinstance(value, (Section, dict)) else f"{here} = {shown(value).removeprefix('the text ')}"
            )
            yet = " yet" if row.status is Status.LATER else ""
            yield f"{setting} has no effect{yet}: {row.does}"
        elif isinstance(value, Section):
            yield from _notices(value, known[name], here)


def is_off(value: Any) -> bool:
    """Say whether `value` is a section with `enabled` switches, at any depth, none of them on."""
    switches = list(_switches(value))
    return bool(switches) and not any(switches)


def _switches(value: Any) -> Iterator[bool]:
    if not isinstance(value, (Section, dict)):
        return
    entries = dict(value)
    if "enabled" in entries:
        yield bool(entries["enabled"])
        if not entries["enabled"]:
            return
    for entry in entries.values():
        yield from _switches(entry)
