"""Muon: momentum of whole matrices, orthogonalised before it is applied (kellerjordan.github.io/posts/muon).

For each matrix [rows, cols] with momentum buffer b:

    b  = lerp(b, g, 1 - momentum)
    u  = lerp(g, b, momentum)                         (Nesterov)
    O  = 5 quintic Newton-Schulz steps from u / |u|   (all singular values pulled towards 1, in bfloat16)
    p  = p (1 - lr weight_decay) - lr sqrt(max(1, rows / cols)) O

A fragment has no singular values: these parameters must be entire on the rank that updates them. What is no matrix,
and embeddings and heads, is left to AdamW inside the same optimizer, in groups whose `use_muon` is false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from craken.optim.closure import loss_of
from craken.optim.fused import fuse_groups, tensors_of
from craken.optim.options import check_rates

_A, _B, _C = 3.4445, -4.7750, 2.0315
_NS_STEPS: Final = 5
_NS_METHODS: Final = ("gram", "standard")
_AUX_DEFAULTS: dict[str, Any] = {
    "decoupled_weight_decay": True,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


class Muon(Optimizer):
    """Muon for groups with `use_muon` (the default), fused AdamW with `betas` and `eps` for the others.

    Stacks of matrices [..., rows, cols] are updated matrix by matrix, convolutions [out, in, h, w] as [out, in h w].
    `ns_method` is understood for DeepSpeed's sake: both of its ways compute the same polynomial, ours is "standard".
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        ns_method: str = "standard",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        check_rates(lr=lr, weight_decay=weight_decay, betas=(momentum, *betas), eps=eps)
        if ns_method not in _NS_METHODS:
            raise ValueError(f"ns_method must be one of {_NS_METHODS}, got {ns_method!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "use_muon": True,
            **_AUX_DEFAULTS,
        }
        super().__init__(params, defaults)
        self._aux = torch.optim.AdamW([{"params": []}])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; `ValueError` for a parameter that is no matrix in a group that uses Muon."""
        if param_group.get("use_muon", True):
            for tensor in tensors_of([param_group]):
                shape = _whole_shape(tensor)
                if len(shape) < 2:
                    raise ValueError(
                        f"Muon updates matrices, got a parameter of shape {tuple(shape)}: "
                        "put it in a group with use_muon=False"
                    )
        else:
            fuse_groups(torch.optim.AdamW, [param_group], {})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = loss_of(closure)
        for group in self.param_groups:
            if group["use_muon"]:
                self._step_matrices(group)
        # Groups and state are this optimizer's own objects, replaced when a state dict is loaded: lend them anew.
        self._aux.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._aux.state = self.state
        self._aux.step()
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        for param in group["params"]:
            grad = param.grad
            if grad is None or grad.numel() == 0:
                continue
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"].lerp_(grad, 1.0 - momentum)
            update = _as_matrices(grad.lerp(buffer, momentum) if group["nesterov"] else buffer)
            scale = max(1.0, update.size(-2) / update.size(-1)) ** 0.5
            param.mul_(1.0 - lr * group["weight_decay"])
            param.add_(orthogonalize(update).reshape(param.shape), alpha=-lr * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return UV' of each matrix's singular value decomposition, roughly: singular values end up in about [0.7, 1.2].

    Five quintic Newton-Schulz steps in bfloat16 with the published coefficients. Shape [..., rows, cols].
    """
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices.bfloat16()
    if x.ndim > 2:
        x = x.reshape(-1, *x.shape[-2:])
    add_product: Callable[..., Tensor] = torch.addmm if x.ndim == 2 else torch.baddbmm
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # spectral norm <= 1
    for _ in range(_NS_STEPS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x if wide else x.mT).reshape(matrices.shape)


def is_muon_matrix(param: Tensor, name: str = "") -> bool:
    """Say whether Muon should update this parameter: a matrix, and by its name neither an embedding nor a head.

    An attribute `use_muon` on the parameter decides before its shape and name do.
    """
    chosen = getattr(param, "use_muon", None)
    if chosen is not None:
        return bool(chosen)
    return len(_whole_shape(param)) >= 2 and "embed" not in name.lower() and "lm_head" not in name.lower()


def _whole_shape(param: Tensor) -> torch.Size:
    """Return a parameter's shape, though it is kept as a shard and shows nothing of itself now."""
    shape: torch.Size = getattr(param, "ds_shape", param.shape)
    return shape


def split_matrices(
    parameters: Iterable[Any], options: Mapping[str, Any], param_names: Mapping[Tensor, str] | None = None
) -> list[dict[str, Any]]:
    """Split parameters or groups into groups of matrices (lr `muon_lr`) and of the rest (lr `adam_lr`).

    A group whose members are all of one kind stays the same dict object; a mixed one keeps its options in both halves.
    Members may be `(name, parameter)` pairs; the names of others come from `param_names`. `options["lr"]` stands in
    for either rate; without it they are 0.02 and 3e-4, as in DeepSpeed.
    """
    names = param_names or {}
    listed = list(parameters)
    whole = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    rates = {
        True: options.get("muon_lr", options.get("lr", 0.02)),
        False: options.get("adam_lr", options.get("lr", 3e-4)),
    }
    groups: list[dict[str, Any]] = []
    for group in whole:
        halves: dict[bool, list[Any]] = {True: [], False: []}
        members = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        for member in members:
            name, param = member if isinstance(member, tuple) else (names.get(member, ""), member)
            halves[is_muon_matrix(param, name)].append(member)
        present = [use for use in (True, False) if halves[use]] or [False]
        for use in present:
            target: dict[str, Any] = group if len(present) == 1 else dict(group)
            target["params"] = halves[use]
            target["use_muon"] = use
            target.setdefault("lr", rates[use])
            target.setdefault("decoupled_weight_decay", options.get("adam_w_mode", True))
            groups.append(target)
    return groups


def _as_matrices(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.size(0), -1) if tensor.ndim == 4 else tensor
