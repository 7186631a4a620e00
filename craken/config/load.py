"""Loads a configuration: read, normalise, validate, check across sections, warn about what has no effect."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from craken.config.checks import check
from craken.config.effects import notices
from craken.config.normalise import Findings, normalise
from craken.config.older_forms import rewrite_older_forms
from craken.config.problems import report
from craken.config.schema import Config
from craken.config.source import read_source
from craken.config.validate import validate
from craken.log import warn_once


def load_config(source: str | os.PathLike[str] | Mapping[str, Any] | Config, *, warns: bool = True) -> Config:
    """Return the checked configuration that `source` is or leads to.

    `source`: a dict (kept as it is, see `Config.raw`), a path to a JSON file, a base64-encoded JSON text, or a Config,
    which is returned unchanged. `warns`: tell of keys without effect, as whoever trains does. ValueError with one line
    a problem, all problems at once.
    """
    if isinstance(source, Config):
        return source
    data, origin = read_source(source)
    findings = Findings()
    known = normalise(Config, rewrite_older_forms(data, findings), "", findings)
    config = validate(Config, known, "", findings)
    check(config, findings)
    if findings.problems:
        raise report(findings.problems, origin)
    for notice in [*findings.notices, *notices(config, known)] if warns else ():
        warn_once(f"configuration: {notice}")
    config._raw = data
    return config


def read_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object that `source` is or leads to, checked, with older forms in today's; a copy at the top.

    ValueError as for `load_config`.
    """
    return rewrite_older_forms(load_config(source, warns=False).raw, Findings())
