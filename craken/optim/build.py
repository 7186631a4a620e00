"""Builds the optimizer that a config section names."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from craken.log import warn_once
from craken.optim.adagrad import Adagrad
from craken.optim.adam import Adam
from craken.optim.fused import fuse_groups
from craken.optim.lamb import Lamb
from craken.optim.layouts import is_steppable, refuse_unsteppable
from craken.optim.lion import Lion
from craken.optim.muon import Muon, split_matrices
from craken.optim.options import check_options, nearest, signature_defaults


class _Kind(NamedTuple):
    """An optimizer class and the options a config may give it, with the defaults that hold in a config."""

    optimizer: type[Optimizer]
    options: dict[str, Any]


_ADAM_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "amsgrad": False,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "foreach": None,
    "fused": None,
    "bias_correction": True,
    "adam_w_mode": True,
    "torch_adam": False,
}
# Switches of the original's own kernels: understood, and of no effect on torch's.
_WITHOUT_EFFECT: dict[str, Any] = {"set_grad_none": True, "fp32_optimizer_states": True}
_KIND_OF = {
    "adam": "adam",
    "adamw": "adamw",
    "fusedadam": "adam",
    "cpuadam": "adam",
    "deepspeedcpuadam": "adam",
    "adagrad": "adagrad",
    "cpuadagrad": "adagrad",
    "deepspeedcpuadagrad": "adagrad",
    "lion": "lion",
    "fusedlion": "lion",
    "cpulion": "lion",
    "deepspeedcpulion": "lion",
    "lamb": "lamb",
    "fusedlamb": "lamb",
    "muon": "muon",
}
_INSTEAD = {
    "onebitadam": "use 'AdamW'; compressed communication is set apart from the optimizer",
    "zerooneadam": "use 'AdamW'; compressed communication is set apart from the optimizer",
    "onebitlamb": "use 'Lamb'; compressed communication is set apart from the optimizer",
    "muadam": "build mup.MuAdam yourself and pass it as initialize(optimizer=...)",
    "muadamw": "build mup.MuAdamW yourself and pass it as initialize(optimizer=...)",
    "musgd": "build mup.MuSGD yourself and pass it as initialize(optimizer=...)",
}


def build_optimizer(
    name: str,
    params: Mapping[str, Any] | None,
    parameters: Iterable[Any],
    *,
    param_names: Mapping[Tensor, str] | None = None,
) -> Optimizer:
    """Build the optimizer `name` of a config with its `params`, over parameters or group dicts (kept as they are).

    Names are DeepSpeed's, and those of `torch.optim`, in any case. Defaults are DeepSpeed's: no weight decay for
    Adam unless `torch_adam`, decoupled decay unless `adam_w_mode` is false. `param_names` tells Muon which matrices
    are embeddings or heads. `ValueError` names the key, `NotImplementedError` what to use instead.
    """
    kind = _KIND_OF.get(name.lower(), name.lower())
    if kind in _INSTEAD:
        raise NotImplementedError(f"optimizer.type '{name}' is not part of craken: {_INSTEAD[kind]}")
    known = _kind(kind, name)
    if "max_grad_norm" in (params or {}):
        raise ValueError("optimizer.params.max_grad_norm does not clip: use the top-level key 'gradient_clipping'")
    options = check_options(params or {}, {**known.options, **_WITHOUT_EFFECT}, where="optimizer.params")
    for key in _WITHOUT_EFFECT:
        if options.pop(key, True) is not True:
            warn_once(f"optimizer.params.{key} has no effect: states are kept in the dtype of the master weights")
    groups = list(parameters)
    try:
        return _construct(kind, known.optimizer, options, groups, param_names)
    except (ValueError, TypeError) as error:
        raise ValueError(f"optimizer.params do not fit '{name}': {error}") from error


def _kind(kind: str, name: str) -> _Kind:
    own = {"lion": Lion, "lamb": Lamb}
    if kind in ("adam", "adamw"):
        return _Kind(Adam, _ADAM_DEFAULTS)
    if kind == "adagrad":
        return _Kind(Adagrad, signature_defaults(torch.optim.Adagrad))
    if kind == "muon":
        return _Kind(Muon, {**signature_defaults(Muon), "muon_lr": 0.02, "adam_lr": 3e-4, "adam_w_mode": True})
    classes = {**_torch_optimizers(), **own}
    if kind not in classes:
        named = sorted({cls.__name__ for cls in (*classes.values(), Muon) if is_steppable(cls)})
        raise ValueError(
            f"optimizer.type '{name}' is no known optimizer{nearest(name, [*_KIND_OF, *named])}; "
            f"known: {', '.join(named)}"
        )
    refuse_unsteppable(classes[kind])
    return _Kind(classes[kind], signature_defaults(classes[kind]))


def _torch_optimizers() -> dict[str, type[Optimizer]]:
    members = vars(torch.optim).items()
    return {
        name.lower(): member
        for name, member in members
        if inspect.isclass(member) and issubclass(member, Optimizer) and member is not Optimizer
    }


def _construct(
    kind: str,
    optimizer_class: type[Optimizer],
    options: dict[str, Any],
    groups: list[Any],
    param_names: Mapping[Tensor, str] | None,
) -> Optimizer:
    if kind in ("adam", "adamw"):
        return _build_adam(kind, options, groups)
    if kind == "muon":
        return Muon(
            split_matrices(groups, options, param_names), **_without(options, "muon_lr", "adam_lr", "adam_w_mode")
        )
    construct: Any = optimizer_class
    if "fused" in signature_defaults(optimizer_class):
        groups, options["fused"] = fuse_groups(optimizer_class, groups, options)
    return construct(groups, **options)  # type: ignore[no-any-return]


def _build_adam(kind: str, options: dict[str, Any], groups: list[Any]) -> Optimizer:
    """Build torch's own Adam or AdamW, or ours where bias correction is off."""
    decoupled = options.pop("adam_w_mode", True)
    if kind == "adamw" and not decoupled:
        warn_once("optimizer.params.adam_w_mode: false has no effect on 'AdamW': name 'Adam' for decay in the gradient")
        decoupled = True
    if not options.pop("torch_adam", False):
        options.setdefault("weight_decay", 0.0)
    if not options.pop("bias_correction", True):
        return Adam(groups, adam_w_mode=decoupled, bias_correction=False, **options)
    plain: type[torch.optim.Adam] = torch.optim.AdamW if decoupled else torch.optim.Adam
    groups, options["fused"] = fuse_groups(plain, groups, options)
    return plain(groups, **options)


def _without(options: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in keys}
