"""The base of every section: a frozen pydantic model that knows the aliases of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One JSON object of the configuration; attribute names are the keys users write.

    `aliases` maps other spellings of a key to the attribute that holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)
    aliases: ClassVar[Mapping[str, str]] = {}


def keys_of(model: type[Section]) -> list[str]:
    """Return every key that `model` understands, aliases last."""
    return [*model.model_fields, *model.aliases]


def section_at(model: type[Section], name: str) -> type[Section] | None:
    """Return the model of the section under key `name`, or None when the key holds a plain value."""
    annotation: Any = model.model_fields[name].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None
