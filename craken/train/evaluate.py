"""Measures a model on the held-out text: the mean loss a token over all ranks' windows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from craken.comm import MeshAxis, all_reduce_sum
from craken.train.windows import Windows


class Validation(NamedTuple):
    loss: float  # nats a token
    num_tokens: int


def validate(
    engine: Any, windows: Windows, numbers: NDArray[np.int64], *, batch_size: int, axis: MeshAxis, device: torch.device
) -> Validation:
    """Collective over `axis`: return the loss on the windows `numbers` [num_ranks, windows_per_rank], in eval mode.

    Every rank runs as many passes, so that a sharded model can gather in them.
    """
    was_training = engine.training
    engine.eval()
    mine = numbers[axis.rank]
    summed = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    with torch.no_grad():
        for start in range(0, len(mine), batch_size):
            batch = windows.batch(mine[start : start + batch_size])
            num_tokens = batch["labels"][:, 1:].numel()
            loss = engine(**{name: ids.to(device) for name, ids in batch.items()}, use_cache=False).loss
            summed += torch.stack([loss.double() * num_tokens, torch.full_like(loss, num_tokens, dtype=torch.float64)])
    engine.train(was_training)
    nats, num_tokens = all_reduce_sum(summed, axis, label="validation").tolist()
    return Validation(nats / num_tokens, int(num_tokens))
