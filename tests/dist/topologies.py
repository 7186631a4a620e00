"""A run's place in the matrix of stages, ranks, dtypes and offloads, and how it trains the same steps in each."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from tests.parity.case import Case
from tests.parity.model import LENGTH, VOCAB, tiny_gpt

NUM_SENTENCES = 24  # of a step, shared out among 1, 2, 3, 4 or 8 ranks
HOST, DISK = "cpu", "nvme"


class Topology(NamedTuple):
    """`states` and `weights` are the devices that optimizer states and parameters are offloaded to."""

    stage: int
    world_size: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    states: str = "none"
    weights: str = "none"

    def __str__(self) -> str:
        offload = "" if self.states == self.weights == "none" else f"-{self.states}-{self.weights}"
        return f"stage{self.stage}-{self.world_size}ranks-{self.dtype}{offload}"


def start(topology: Topology, swap_folder: str, *, nudge: float = 0.0, **sections: Any) -> Any:
    """Return an engine on this rank, host and device kept apart; `nudge` moves all initial weights.

    sections: of the config, besides those that the topology means.
    """
    import craken
    from craken.engine import offload
    from craken.zero import Link

    config = Case(topology.dtype, topology.world_size, clip=1.0).config(topology.stage) | sections
    config["train_micro_batch_size_per_gpu"] = NUM_SENTENCES // topology.world_size
    for section, device in (("offload_optimizer", topology.states), ("offload_param", topology.weights)):
        if device != "none":
            config["zero_optimization"][section] = {"device": device, "nvme_path": swap_folder, "buffer_count": 2}
    model = tiny_gpt()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(nudge)
    with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
        engine, *_ = craken.initialize(model=model, config=config)
    return engine


def tokens(step: int) -> Tensor:
    """Return this rank's part [sentences, length + 1] of what all ranks see together at a step."""
    generator = torch.Generator().manual_seed(step)
    together = torch.randint(0, VOCAB // 4, (NUM_SENTENCES, LENGTH + 1), generator=generator)
    return together.chunk(dist.get_world_size())[dist.get_rank()]


def train(engine: Any, num_steps: int) -> list[float]:
    """Take steps from where the engine stands; return the loss over all sentences at each."""
    losses = []
    for _ in range(num_steps):
        loss = engine(tokens(engine.global_steps))
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses
