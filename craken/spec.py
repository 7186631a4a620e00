"""Frozen facts that rooms exchange: what part of which tensor a rank keeps, and kinds of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# kinds of tensors in a checkpoint: masters, weights that are not trained, buffers, and by its key a state of a master
WEIGHT, FROZEN, BUFFER, OPTIMIZER = "weight", "frozen", "buffer", "optimizer."


@dataclass(frozen=True)
class ShardSpec:
    """A contiguous range of one flattened tensor, kept by one rank.

    `offset` and `numel` count elements of the row-major flattened tensor `fqn` of shape `global_shape`; the range is
    [offset, offset + numel). A tensor kept whole has offset 0 and numel equal to the product of its shape.
    """

    fqn: str
    global_shape: tuple[int, ...]
    offset: int
    numel: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.numel < 0 or self.offset + self.numel > self.global_numel:
            raise ValueError(
                f"shard of {self.fqn}: range [{self.offset}, {self.offset + self.numel}) does not lie in "
                f"[0, {self.global_numel}), the {self.global_numel} elements of shape {self.global_shape}"
            )

    @classmethod
    def whole(cls, fqn: str, shape: Sequence[int]) -> ShardSpec:
        """Return the range that is all of a tensor."""
        return cls(fqn, tuple(shape), 0, math.prod(shape))

    @property
    def global_numel(self) -> int:
        return math.prod(self.global_shape)

    @property
    def is_whole(self) -> bool:
        return self.numel == self.global_numel
