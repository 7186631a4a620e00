"""Counts micro-batches and says which one is the last of a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Accumulation:
    """Where a job is within a step of `steps` micro-batches.

    Micro-batches are counted by `step()` calls. Once the user has set the boundary flag, only that flag counts.
    """

    steps: int
    micro_steps: int = 0
    in_step: int = 0  # micro-batches of the step under way that are done
    flag: bool | None = None

    @property
    def is_boundary(self) -> bool:
        """The micro-batch under way is the last of its step."""
        if self.flag is not None:
            return self.flag
        return self.in_step + 1 >= self.steps

    def advance(self) -> None:
        self.in_step = 0 if self.is_boundary else self.in_step + 1
        self.micro_steps += 1
