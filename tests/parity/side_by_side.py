"""An engine and a plain optimizer driven through the same steps in one rank's process, compared by weights.

The plain side sees the mean of all ranks' losses, so its gradients are what the engine must average over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE, DECAY = 1e-2, 0.1
ADAMW = {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": DECAY}}


class TwoPaths(nn.Module):
    """Two linear layers of which a forward may use either or both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor, *, left: bool = True, right: bool = True) -> Tensor:
        return (self.left(x) if left else 0.0) + (self.right(x).square() if right else 0.0) + x.new_zeros(())


def two_paths() -> TwoPaths:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TwoPaths()


def value(param: Tensor) -> Tensor:
    """Return a copy of a parameter; collective where an engine keeps it as shards."""
    from craken.zero import GatheredParameters

    with GatheredParameters(param):
        return param.detach().clone()


def inputs(step: int, rank: int) -> Tensor:
    """Return [3, 6] numbers that only depend on the step and the rank."""
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(100 * step + rank))


def error(output: Tensor) -> Tensor:
    """A loss over everything the model put out."""
    return F.mse_loss(output.float(), torch.ones_like(output, dtype=torch.float32))


class Pair:
    """The engine with its model, and the plain twin with its optimizer."""

    def __init__(
        self,
        stage: int,
        model: nn.Module | None = None,
        *,
        accumulation: int = 1,
        config: dict[str, Any] | None = None,
        **initialize: Any,
    ) -> None:
        import craken
        from craken.zero import GatheredParameters

        self.model = model if model is not None else two_paths()
        with GatheredParameters(self.model.parameters()):
            self.twin = copy.deepcopy(self.model)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        settings = {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": accumulation,
            "steps_per_print": 10**9,
            "gradient_clipping": 0.0,  # absent, it is 1.0
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 20, "stage3_param_persistence_threshold": 0},
            **({} if "optimizer" in initialize else {"optimizer": ADAMW}),
            **(config or {}),
        }
        self.engine, self.optimizer, *_ = craken.initialize(model=self.model, config=settings, **initialize)
        trained = [param for param in self.twin.parameters() if param.requires_grad]
        self.twin_optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            trained, lr=LEARNING_RATE, weight_decay=DECAY, fused=True
        )

    def twin_backward(self, step: int, factor: float = 1.0, **forward: Any) -> None:
        """Add to the twin's gradients what the mean of all ranks' losses, times `factor`, gives."""
        self.twin_backward_of(lambda rank: error(self.twin(inputs(step, rank), **forward)), factor)

    def twin_backward_of(self, loss_of_rank: Callable[[int], Tensor | None], factor: float = 1.0) -> None:
        losses = [loss for rank in range(self.world_size) if (loss := loss_of_rank(rank)) is not None]
        (torch.stack(losses).sum() * (factor / self.world_size)).backward()

    def twin_step(self) -> None:
        self.twin_optimizer.step()
        self.twin_optimizer.zero_grad()

    def step_both(self, step: int, **forward: Any) -> None:
        """One ordinary step on both sides."""
        self.engine.backward(error(self.engine(inputs(step, self.rank), **forward)))
        self.engine.step()
        self.engine.check_integrity()
        self.twin_backward(step, **forward)
        self.twin_step()

    def assert_same_weights(self, atol: float = 2e-7) -> None:
        """Compare all weights, to a few units of rounding."""
        self.engine.check_integrity()
        pairs = zip(self.model.named_parameters(), self.twin.parameters(), strict=True)
        for (name, param), plain in pairs:
            ours = value(param)
            torch.testing.assert_close(ours, plain.detach(), rtol=2e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}")

    def close(self) -> None:
        self.engine.destroy()
