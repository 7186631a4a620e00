"""Says which settings of a configuration change nothing here, from the table of known keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from craken.config.known_keys import KNOWN_KEYS, Status
from craken.config.normalise import join
from craken.config.problems import shown
from craken.config.schema import Config
from craken.config.section import Section
from craken.config.sections.zero import PARAMETERS_SHARDED, OffloadOptimizer, OffloadParam

_READ_WITH_FILES = {"nvme_path", "buffer_count", "pipeline_read", "pipeline_write"}


def notices(config: Config, known: Mapping[str, Any]) -> list[str]:
    """Return one line for each key in `known` that differs from its default and has no effect.

    A section without effect gives one line, and none when it is switched off.
    """
    return list(_notices(config, known, "", config.zero_optimization.stage))


def _notices(section: Section, known: Mapping[str, Any], path: str, stage: int) -> Iterator[str]:
    for name in known:
        here, value = join(path, name), getattr(section, name)
        if value == type(section).model_fields[name].get_default(call_default_factory=True) or is_off(value):
            continue
        if name == "nvme_path" and value == "none":  # as accelerate fills in "auto"
            continue
        row = KNOWN_KEYS[here]
        if row.status in (Status.LATER, Status.NO_EFFECT):
            setting = (
                here if isinstance(value, (Section, dict)) else f"{here} = {shown(value).removeprefix('the text ')}"
            )
            yet = " yet" if row.status is Status.LATER else ""
            yield f"{setting} has no effect{yet}: {row.does}"
        elif isinstance(value, Section):
            yield from _notices(value, known[name], here, stage)
        elif row.status is Status.STAGE_3 and stage < PARAMETERS_SHARDED and not name.startswith("stage3_"):
            yield f"{here} has no effect at stage {stage}: it is read at stage 3 only"
        elif isinstance(section, (OffloadParam, OffloadOptimizer)) and not _is_read(section, name):
            yield f'{here} has no effect with "device": "{section.device}"'


def _is_read(offload: OffloadParam | OffloadOptimizer, name: str) -> bool:
    return offload.device == "nvme" or (offload.device == "cpu" and name not in _READ_WITH_FILES)


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
