"""What a shard group is told about itself: what it talks through, and what it does with its numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from craken.comm import MeshAxis, Transport
from craken.precision import Precision
from craken.zero.layout import Cut
from craken.zero.placement import ON_DEVICE, Placement
from craken.zero.policy import Keep, Policy
from craken.zero.shelf import Shelf


@dataclass(frozen=True)
class Wire:
    """What a group talks through: the axis and what carries its collectives, its device, and where else it may rest."""

    axis: MeshAxis
    transport: Transport
    shelf: Shelf

    @property
    def device(self) -> torch.device:
        return self.shelf.link.device


@dataclass(frozen=True)
class GroupRules:
    """What a group does with its numbers: the policy row, dtypes, how parameters may be cut, and the pre-division.

    `predivide` divides gradients before they travel, against overflow in fp16. `accumulates` says that a step has
    several micro-batches, so that gradients kept FULL are held between them; with one, they only pass through.
    `trains` false is for frozen parameters: no gradients, no optimizer, the shard of the weights is all there is.
    """

    policy: Policy
    precision: Precision
    cut: Cut = Cut.PACKED
    predivide: float = 1.0
    accumulates: bool = False
    trains: bool = True
    placement: Placement = ON_DEVICE

    @property
    def retains_full_grads(self) -> bool:
        """The full gradient buffer stays until the step; otherwise it is scratch, and only the shard stays."""
        return self.policy.gathers_grads or (self.accumulates and self.policy.grads is Keep.FULL)

    def accumulating(self) -> GroupRules:
        """Return the rules for a step of several micro-batches."""
        accumulate = self.precision.accumulate or torch.float32
        return replace(self, accumulates=True, precision=replace(self.precision, accumulate=accumulate))
