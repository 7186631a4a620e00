"""Runs a model over normalised values and words what pydantic finds as problems."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from craken.config.normalise import Findings, join
from craken.config.problems import Problem, shown
from craken.config.section import Section
from craken.config.values import Mismatch

Model = TypeVar("Model", bound=Section)


def validate(model: type[Model], known: dict[str, Any], path: str, findings: Findings) -> Model:
    """Return the section that `known` describes, without the values that are wrong: those go to `findings`.

    Going on without the wrong values lets one report name all problems. `known` loses them too.
    """
    while True:
        try:
            return model.model_validate(known)
        except ValidationError as error:
            for detail in error.errors():
                keys = [str(key) for key in detail["loc"]]
                findings.problems.append(_problem(detail, join(path, ".".join(keys)), findings))
                _remove(known, keys[:-1] if detail["type"] == "missing" else keys)


def _problem(detail: ErrorDetails, path: str, findings: Findings) -> Problem:
    where = findings.path(path)
    if detail["type"] == "missing":
        return Problem(where, "a name in quotes", "nothing", _MISSING.get(path, "add it"))
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, Mismatch):
        return Problem(where, cause.expected, shown(detail["input"]), cause.hint)
    return Problem(where, detail["msg"], shown(detail["input"]))


_MISSING = {
    "optimizer.type": 'write for example "type": "AdamW"',
    "scheduler.type": 'write for example "type": "WarmupLR"',
}


def _remove(known: dict[str, Any], keys: list[str]) -> None:
    *sections, last = keys
    for key in sections:
        known = known[key]
    known.pop(last, None)
