"""Builds the learning-rate schedule that a config section names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from craken.optim.cycles import LRRangeTest, OneCycle
from craken.optim.options import check_options, nearest, signature_defaults
from craken.optim.schedule import Schedule
from craken.optim.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

_SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)
}
VALID_LR_SCHEDULES = list(_SCHEDULES)


def build_scheduler(name: str, params: Mapping[str, Any] | None, optimizer: Optimizer) -> Any:
    """Build the schedule `name` of a config with its `params` on `optimizer`: DeepSpeed's five, or any of torch's.

    `ValueError` names the key. A schedule that must be told a metric (`ReduceLROnPlateau`) is refused: the engine
    steps without one.
    """
    schedule = _schedule_class(name)
    options = check_options(params or {}, signature_defaults(schedule), where="scheduler.params", may_list_numbers=True)
    try:
        return schedule(optimizer, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"scheduler.params do not fit '{name}': {error}") from error


def _schedule_class(name: str) -> Any:
    known: dict[str, Any] = {**_torch_schedulers(), **_SCHEDULES}
    if name not in known:
        raise ValueError(
            f"scheduler.type '{name}' is no known schedule{nearest(name, known)}; "
            f"known: {', '.join(VALID_LR_SCHEDULES)} and those of torch.optim.lr_scheduler"
        )
    if "metrics" in inspect.signature(known[name].step).parameters:
        raise ValueError(
            f"scheduler.type '{name}' needs a metric in step(), which the engine does not have: step it yourself "
            "on engine.optimizer, without a scheduler section"
        )
    return known[name]


def _torch_schedulers() -> dict[str, Any]:
    base = lr_scheduler.LRScheduler
    members = vars(lr_scheduler).items()
    return {
        name: member
        for name, member in members
        if inspect.isclass(member) and issubclass(member, base) and member is not base and not name.startswith("_")
    }
