"""Gets the torch optimizer and the schedule that a request and its config ask for."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from craken.config import Config
from craken.engine.request import Request
from craken.log import warn_once
from craken.optim import Layout, build_optimizer, build_scheduler, fuse_where_open, param_layouts
from craken.zero import Cut

NO_OPTIMIZER = (
    "the config has a scheduler but no optimizer that it could drive: passed over. To train, add an `optimizer` "
    "section or pass one"
)


def get_optimizer(request: Request, config: Config, trainable: Sequence[tuple[str, nn.Parameter]]) -> Optimizer | None:
    """Return the user's optimizer, or build the config's; None when neither names one."""
    if isinstance(request.optimizer, Optimizer):
        _check_members(request.optimizer.param_groups, trainable, request.model)
        fuse_where_open(request.optimizer)
        return request.optimizer
    if request.optimizer is None and config.optimizer is None:
        return None
    groups = _trainable_groups(request, trainable)
    _check_members(groups, trainable, request.model)
    if request.optimizer is not None:
        made = request.optimizer(groups[0]["params"] if set(groups[0]) == {"params"} and len(groups) == 1 else groups)
        if not isinstance(made, Optimizer):
            raise ValueError(f"optimizer: the function returned a {type(made).__name__}, expected a torch optimizer")
        _check_members(made.param_groups, trainable, request.model)
        return made
    assert config.optimizer is not None
    names: dict[Tensor, str] = {param: name for name, param in trainable}
    return build_optimizer(config.optimizer.type, config.optimizer.params, groups, param_names=names)


def get_scheduler(request: Request, config: Config, optimizer: Optimizer | None) -> Any:
    """Return the user's schedule (built on `optimizer` if it is a function), or the config's, or None."""
    given = request.lr_scheduler
    if given is not None:
        is_factory = callable(given) and not hasattr(given, "step")
        if is_factory and optimizer is None:
            raise ValueError("lr_scheduler is a function of the optimizer, but there is no optimizer: give one")
        return given(optimizer) if is_factory else given
    if config.scheduler is None:
        return None
    if optimizer is None:  # a training run's config, used to evaluate
        warn_once(NO_OPTIMIZER)
        return None
    return build_scheduler(config.scheduler.type, config.scheduler.params, optimizer)


def check_buildable(config: Config, *, has_optimizer: bool, has_scheduler: bool) -> None:
    """Build the config's optimizer and schedule on a stand-in for the model; ValueError if they can't be built.

    has_optimizer, has_scheduler: the user hands one in, which wins over the config's. Needs no other rank: what is
    wrong with names and values comes out before ranks meet.
    """
    if has_optimizer or config.optimizer is None:
        return
    with _no_compiler():
        optimizer = build_optimizer(config.optimizer.type, config.optimizer.params, [nn.Parameter(torch.zeros(2, 2))])
    param_layouts(optimizer)
    if config.scheduler is not None and not has_scheduler:
        build_scheduler(config.scheduler.type, config.scheduler.params, optimizer)


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Let optimizers be made without `torch._dynamo`, which takes 2 s to import and is there for their steps.

    torch's decorator of `add_param_group` imports it. A check alone needs none; and ranks that go on to build the real
    one import it side by side, where the first, which checks on behalf of all, would have the others wait for it.
    """
    given = Optimizer.add_param_group
    Optimizer.add_param_group = inspect.unwrap(given)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = given  # type: ignore[method-assign]


def cuts_of(optimizer: Optimizer) -> dict[int, Cut]:
    """Return by id of each parameter how the optimizer lets it be cut; ValueError if it cannot work on shards."""
    return {
        id(param): Cut.WHOLE if layout is Layout.WHOLE else Cut.PACKED
        for options, layouts in zip(optimizer.param_groups, param_layouts(optimizer), strict=True)
        for param, layout in zip(options["params"], layouts, strict=True)
    }


def members(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer updates."""
    return {id(param) for options in optimizer.param_groups for param in options["params"]}


def _trainable_groups(request: Request, trainable: Sequence[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    given = request.model_parameters
    if given is None:
        return [{"params": [param for _, param in trainable]}]
    entries = list(given)
    if not entries:
        raise ValueError(
            "model_parameters is empty; expected parameters or groups of them (a generator can be read only once)"
        )
    if not isinstance(entries[0], dict):
        entries = [{"params": entries}]
    return [{**options, "params": _taking_grads(options["params"])} for options in entries]


def _taking_grads(params: Iterable[Any]) -> list[Any]:
    params = [params] if isinstance(params, nn.Parameter) else params
    return [entry for entry in params if (entry[1] if isinstance(entry, tuple) else entry).requires_grad]


def _check_members(
    groups: Sequence[dict[str, Any]], trainable: Sequence[tuple[str, nn.Parameter]], model: nn.Module
) -> None:
    names = {id(param): name for name, param in model.named_parameters()}
    seen: dict[int, int] = {}
    for index, options in enumerate(groups):
        for entry in options["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry
            if id(param) not in names:
                raise ValueError(
                    f"optimizer group {index} holds a parameter of shape {tuple(param.shape)} that is not in the "
                    "model; make the optimizer from this model's parameters()"
                )
            if id(param) in seen:
                raise ValueError(
                    f"parameter {names[id(param)]} is in optimizer groups {seen[id(param)]} and {index}; "
                    "expected each parameter in one group, once"
                )
            seen[id(param)] = index
    if not any(id(param) in seen for _, param in trainable):
        raise ValueError(
            f"nothing to train: of the model's {len(names)} parameters the optimizer holds none that requires_grad; "
            "unfreeze some, or pass no optimizer for inference"
        )
