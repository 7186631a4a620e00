"""Rewrites older and misplaced forms of settings into the ones the models know; the user's dict stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from craken.config.normalise import Findings
from craken.config.problems import Problem
from craken.config.sections.memory import ActivationCheckpointing


def rewrite_older_forms(given: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Return a copy of the top level in today's form.

    `zero_optimization: true`, `cpu_offload`, `cpu_offload_param`, and activation checkpointing inside `checkpoint`.
    """
    config = dict(given)
    if isinstance(config.get("zero_optimization"), bool):
        config["zero_optimization"] = _zero_from_flag(config)
    if isinstance(config.get("zero_optimization"), Mapping):
        config["zero_optimization"] = _zero_with_offload(config["zero_optimization"], findings)
    if isinstance(config.get("checkpoint"), Mapping):
        _lift_activation_checkpointing(config, findings)
    return config


def _zero_from_flag(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config["zero_optimization"]:
        return {"stage": 0}
    size = config.get("allgather_size")
    return {"stage": 1} if size is None else {"stage": 1, "allgather_bucket_size": size}


def _zero_with_offload(given: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    zero = dict(given)
    for flag, section in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.get(flag) is not True:
            continue
        old, new = f"zero_optimization.{flag}", f"zero_optimization.{section}"
        if zero.get(section) is None:
            zero[section] = {"device": "cpu"}
            findings.spelt[new] = old
        else:
            findings.problems.append(
                Problem(old, f'it or "{new}"', "both", f'remove "{flag}": it is the older form of "{section}"')
            )
    return zero


def _lift_activation_checkpointing(config: dict[str, Any], findings: Findings) -> None:
    checkpoint = dict(config["checkpoint"])
    lifted = {key: checkpoint.pop(key) for key in ActivationCheckpointing.model_fields if key in checkpoint}
    where = {key: f"checkpoint.{key}" for key in lifted}
    nested = checkpoint.pop("activation_checkpointing", None)
    if isinstance(nested, Mapping):
        lifted.update(nested)
        where.update({key: f"checkpoint.activation_checkpointing.{key}" for key in nested})
    elif nested is not None:
        checkpoint["activation_checkpointing"] = nested  # no object: reported as such where it stands
    config["checkpoint"] = checkpoint
    if not lifted:
        return
    if config.get("activation_checkpointing") is not None:
        findings.problems.append(
            Problem(
                next(iter(where.values())),
                "activation checkpointing in one place",
                'it here and in "activation_checkpointing"',
                'keep the section "activation_checkpointing"',
            )
        )
        return
    config["activation_checkpointing"] = lifted
    findings.spelt.update({f"activation_checkpointing.{key}": path for key, path in where.items()})
