"""What a shard group is told about itself: what it talks through, and what it does with its numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from craken.comm import Channel, MeshAxis, Transport
from craken.precision import Precision
from craken.zero.memory.placement import ON_DEVICE, Placement
from craken.zero.memory.shelf import Shelf
from craken.zero.plans.layout import Cut
from craken.zero.plans.policy import Keep, Policy


@dataclass(frozen=True)
class Replication:
    """The mesh of a model that is sharded over some ranks and repeated over the others (MiCS, arXiv 2205.00119).

        shard axis        0 1 | 2 3       gathers, and sums in each backward
        replicate axis    0 2 | 1 3       sums of the same shard, once a step
        everyone          0 1 2 3         norms, votes, first values

    `replicas` serves sums of gradients alone.
    """

    replicas: Channel
    everyone: MeshAxis


@dataclass(frozen=True)
class Sources:
    """What brings whole weights together. Each serves gathers of weights alone, in an order that all ranks share.

    `exact` brings what the shards hold, for users who read and write; `quick` may round, alike on all ranks, for
    forwards and backwards. `inner`: over which second copies are kept, if any.
    """

    exact: Transport
    quick: Transport
    inner: Channel | None = None


@dataclass(frozen=True)
class Wire:
    """What a group talks through: the axis it is sharded over, what carries its collectives, and where it may rest.

    `weights` brings weights together that are kept as shards.
    """

    axis: MeshAxis
    transport: Transport
    shelf: Shelf
    weights: Sources
    replication: Replication | None = None

    @property
    def device(self) -> torch.device:
        return self.shelf.link.device

    @property
    def everyone(self) -> MeshAxis:
        """The axis over all ranks that train the model."""
        return self.axis if self.replication is None else self.replication.everyone

    @property
    def num_replicas(self) -> int:
        """How many ranks hold the same shard."""
        return 1 if self.replication is None else self.replication.replicas.axis.size


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
