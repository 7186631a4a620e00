"""Every key and alias that a configuration may hold, and what each does here."""

from __future__ import annotations

from craken.config.keys.data import DATA_KEYS
from craken.config.keys.row import KnownKey, Status
from craken.config.keys.tools import TOOLS
from craken.config.keys.training import SCHEDULES, TRAINING
from craken.config.keys.zero import ZERO_KEYS

KNOWN_KEYS: dict[str, KnownKey] = {row.path: row for row in [*TRAINING, *ZERO_KEYS, *TOOLS, *DATA_KEYS]}
SCHEDULE_KEYS = SCHEDULES  # the keys of `scheduler.params`, which depend on `scheduler.type`

__all__ = ["KNOWN_KEYS", "SCHEDULE_KEYS", "KnownKey", "Status"]
