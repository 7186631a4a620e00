"""Turns what users may write into what the models take: aliases, "auto", older forms, foreign and mistyped keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from craken.config.known_keys import KNOWN_KEYS
from craken.config.problems import Problem, shown
from craken.config.section import Section, keys_of, section_at
from craken.config.values import nearest, plain

SLIP_RATIO = 0.85  # "zero_optimisation" is 0.94 like the key that was meant, "checkpoint_dir" 0.83, "msamp" 0.75
SLIP_PREFIX = 10  # "train_micro_batch_size" lacks the end of a key; a shorter beginning says too little
MOST_HOMES = 3  # a key such as "enabled" stands in so many sections that naming them helps nobody


@dataclass
class Findings:
    """What one reading of a configuration brought to light besides its values."""

    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    spelt: dict[str, str] = field(default_factory=dict)  # path of a key -> path as the user wrote it

    def path(self, path: str) -> str:
        """Return `path` as the user wrote it."""
        head, _, tail = path.rpartition(".")
        if path in self.spelt or not head:
            return self.spelt.get(path, path)
        return f"{self.path(head)}.{tail}"


def join(path: str, key: str) -> str:
    """Return the path of `key` inside the section at `path` ("" is the top level)."""
    return f"{path}.{key}" if path else key


def normalise(model: type[Section], given: Mapping[str, Any], path: str, findings: Findings) -> dict[str, Any]:
    """Return the keys and values of `given` that `model` knows, under their attribute names.

    Null and "auto" are left out. Everything that has no place goes to `findings`.
    """
    known: dict[str, Any] = {}
    for key, value in given.items():
        name = model.aliases.get(key, key)
        if not isinstance(key, str) or name not in model.model_fields:
            _unknown(model, key, path, findings)
            continue
        if value is None or _is_auto(value):
            if _is_auto(value) and join(path, name) == "zero_optimization.stage":
                findings.notices.append('zero_optimization.stage: "auto" is not chosen yet; stage 0 is used')
            continue
        here = join(path, name)
        if key != name:
            findings.spelt[here] = join(findings.path(path), key)
        if name in known:
            findings.problems.append(_twice(model, name, path, given))
            continue
        cleaned = _normalise_value(model, name, value, here, findings)
        if cleaned is not None:
            known[name] = cleaned
    return known


def _normalise_value(model: type[Section], name: str, value: Any, here: str, findings: Findings) -> Any:
    nested = section_at(model, name)
    if nested is None:
        return without_auto(value)
    if not isinstance(value, Mapping):
        example = next(iter(nested.model_fields))
        findings.problems.append(
            Problem(findings.path(here), "an object { }", shown(value), f'write {{"{example}": ...}}')
        )
        return None
    return normalise(nested, value, here, findings)


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def without_auto(value: Any) -> Any:
    """Return `value` without the entries of its objects that are "auto"."""
    if isinstance(value, Mapping):
        return {key: without_auto(entry) for key, entry in value.items() if not _is_auto(entry)}
    return value


def _twice(model: type[Section], name: str, path: str, given: Mapping[str, Any]) -> Problem:
    spellings = [key for key in given if model.aliases.get(key, key) == name]
    both = " and ".join(f'"{key}"' for key in spellings)
    return Problem(join(path, name), "one spelling of the key", f"{both}, which mean the same", f'keep "{name}"')


# what other trainers call a key of the top level
_HOMES = {
    "gradient_clipping": ("max_grad_norm", "clip_grad_norm", "grad_clip", "max_norm"),
    "train_micro_batch_size_per_gpu": ("micro_batch_size", "per_device_train_batch_size", "per_device_batch_size"),
    "train_batch_size": ("batch_size", "global_batch_size"),
}


def _unknown(model: type[Section], key: Any, path: str, findings: Findings) -> None:
    if path or not isinstance(key, str):
        findings.problems.append(_unknown_in_section(model, str(key), path, findings))
        return
    meant = slip_of(key, keys_of(model))
    if meant:
        findings.problems.append(Problem(key, "a known key", "an unknown one", f'did you mean "{meant}"?'))
        return
    called = [home for home, words in _HOMES.items() if key.lower() in words]
    homes = called or homes_of(key) or longer_names(key, keys_of(model))
    findings.notices.append(
        f'unknown top-level key "{key}" is left alone{f"; {_did_you_mean(homes)}" if homes else ""}'
    )


def _unknown_in_section(model: type[Section], key: str, path: str, findings: Findings) -> Problem:
    known = keys_of(model)
    meant = nearest(key, known)
    homes = [] if meant and plain(meant) == plain(key) else homes_of(key, path)
    if homes:
        hint = _did_you_mean(homes)
    elif meant:
        hint = _did_you_mean([join(findings.path(path), meant)])
    else:
        hint = f"known here: {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}"
    return Problem(findings.path(join(path, key)), "a known key", "an unknown one", hint)


def _did_you_mean(names: list[str]) -> str:
    return f"did you mean {' or '.join(json.dumps(name) for name in names)}?"


def slip_of(key: str, known: list[str]) -> str | None:
    """Return the known top-level key that `key` is a slip of, or None when it is a key of somebody else's."""
    if "." in key:
        return None
    for name in known:
        if plain(name) == plain(key):
            return name
    beginnings = [name for name in known if len(key) >= SLIP_PREFIX and name.startswith(key.lower())]
    if len(beginnings) == 1:
        return beginnings[0]
    close = get_close_matches(key.lower(), known, n=1, cutoff=SLIP_RATIO)
    return close[0] if close else None


def homes_of(key: str, path: str = "") -> list[str]:
    """Return where the known keys spelt `key` stand: below `path` if there are any, else anywhere if that says much."""
    homes = [known for known in KNOWN_KEYS if known.rpartition(".")[2] == key and "*" not in known]
    below = [home for home in homes if path and home.startswith(f"{path}.")]
    homes = below or homes
    return homes if len(homes) <= MOST_HOMES else []


def longer_names(key: str, known: list[str]) -> list[str]:
    """Return the shortest known name that has all words of `key` in a row, such as "zero_optimization" for "zero"."""
    longer = [name for name in known if f"_{key.lower()}_" in f"_{name}_"]
    return sorted(longer, key=len)[:1]
