"""What clients do to a model at stage 3 that no layer of torch's does."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs


class FusedHead(torch.autograd.Function):
    """A head as fused losses have it: it gathers the weight itself, unless that is there, in forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with whole(weight):
            return hidden @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        with whole(weight):
            return grad @ weight, grad.T @ hidden


def whole(weight: Tensor) -> Any:
    from craken.zero import GatheredParameters, ZeroParamStatus

    is_there = getattr(weight, "ds_status", ZeroParamStatus.AVAILABLE) == ZeroParamStatus.AVAILABLE
    return contextlib.nullcontext() if is_there else GatheredParameters([weight])


class WithFusedHead(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return FusedHead.apply(self.body(x), self.head.weight)


def train_with_fused_head(stage: int) -> None:
    torch.manual_seed(0)
    pair = Pair(stage, WithFusedHead())
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights()
    pair.engine.check_integrity()
    pair.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_trained_head_may_be_gathered_by_the_function_that_uses_it(run_ranks, stage) -> None:
    run_ranks(train_with_fused_head, 2, stage)


def redirected(stage: int) -> None:
    """Run another function under the engine's forward, as clients do that replace `module.forward` for one call."""
    pair = Pair(stage)
    module, original = pair.engine.module, pair.engine.module.forward
    module.forward = lambda x: original(x) * 2
    try:
        output = pair.engine(inputs(0, pair.rank))
    finally:
        del module.forward
    pair.engine.backward(error(output) + 0 * error(pair.engine(inputs(0, pair.rank))))
    doubled = output.detach()
    assert torch.equal(doubled, 2 * pair.engine(inputs(0, pair.rank)).detach())
    pair.engine.step()
    pair.close()


@pytest.mark.parametrize("stage", [0, 3])
def test_a_forward_that_is_replaced_for_one_call_is_the_one_that_runs(run_ranks, stage) -> None:
    run_ranks(redirected, 2, stage)


def placeholders(device: str, folder: str) -> None:
    import craken

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "offload_param": {"device": device, "nvme_path": folder},
        },
    }
    engine, *_ = craken.initialize(model=model, config=config)
    for param in model.parameters():
        assert (tuple(param.shape), param.dtype, param.device) == ((0,), torch.bfloat16, engine.device)
    engine.destroy()


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
def test_a_placeholder_has_the_dtype_and_device_that_it_computes_with(run_ranks, tmp_path, device) -> None:
    run_ranks(placeholders, 2, device, str(tmp_path))
