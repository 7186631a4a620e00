"""What a user hands to `initialize`, checked on its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

OptimizerOrFactory = Optimizer | Callable[[Any], Optimizer]
ConfigSource = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """The arguments of `initialize` that describe a job."""

    model: nn.Module
    optimizer: OptimizerOrFactory | None = None
    model_parameters: Iterable[Any] | None = None
    training_data: Dataset[Any] | None = None
    lr_scheduler: Any = None
    collate_fn: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {_kind(self.model)}")
        if self.optimizer is not None and not isinstance(self.optimizer, Optimizer) and not callable(self.optimizer):
            raise ValueError(
                "optimizer: expected a torch.optim.Optimizer or a function that takes parameters and returns one, got "
                + _kind(self.optimizer)
            )
        if isinstance(self.lr_scheduler, type):
            raise ValueError(
                f"lr_scheduler: got the class {self.lr_scheduler.__name__}; expected an instance, or a function that "
                "takes the optimizer and returns one"
            )


def find_config(config: Any, config_params: Any, args: Any) -> ConfigSource:
    """Return the one config among `config`, `config_params` and `args.deepspeed_config`."""
    from_args = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    given = {
        "config": config,
        "config_params": config_params,
        "args.deepspeed_config (--deepspeed_config)": from_args,
    }
    named = {name: value for name, value in given.items() if value is not None}
    if not named:
        raise ValueError(
            "no config: expected initialize(config=<dict or path>), or args with deepspeed_config set "
            "(--deepspeed_config FILE)"
        )
    first = next(iter(named.values()))
    if any(value is not first and value != first for value in named.values()):
        raise ValueError(f"two different configs: {' and '.join(named)} are both given; give one of them")
    found: ConfigSource = first
    return found


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
