"""On CUDA: models built as shards on the device or in the host's memory train as models built whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.down.bias)  # a child that is sharded already
        self.register_buffer("scale", torch.linspace(0, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(self.up(x).relu())


def trained(built_as_shards: bool, where: str) -> list[float]:
    """Return the losses of a few steps, after checks of what the parameters are meanwhile."""
    import craken
    from craken.zero import GatheredParameters, Init, safe_get_full_fp32_param, safe_get_full_grad

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": {"device": where}}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
    }
    torch.manual_seed(0)
    with Init(config_dict_or_path=config, enabled=built_as_shards):
        model = nn.Sequential(*(Block(256) for _ in range(4)))
    if built_as_shards:
        assert {(param.device.type, tuple(param.shape)) for param in model.parameters()} == {("cuda", (0,))}
        assert model[0].scale.device.type == "cuda"
        with GatheredParameters(model[0].parameters()):
            assert model[0].down.weight.device.type == "cuda"
            assert not model[0].down.bias.any()
    engine, *_ = craken.initialize(model=model, config=config)
    x, losses = torch.randn(4, 256, generator=torch.Generator().manual_seed(1)).cuda(), []
    weight = model[1].up.weight
    for _ in range(4):
        loss = (engine(x) - 1).square().mean()
        engine.backward(loss)
        grad = safe_get_full_grad(weight)
        assert grad is not None
        assert grad.shape == (1024, 256)
        engine.step()
        losses.append(loss.item())
    with GatheredParameters(weight, modifier_rank=0):
        weight.data.mul_(0.5)
        edited = weight.detach().clone()
    master: Any = safe_get_full_fp32_param(weight)
    assert torch.equal(master.cuda(), edited)
    engine.destroy()
    return losses


@pytest.mark.parametrize("where", ["none", "cpu"])
def test_a_model_built_as_shards_trains_as_one_built_whole(run_ranks, where) -> None:
    (whole,) = run_ranks(trained, 1, False, where, joins_world=False)
    (shards,) = run_ranks(trained, 1, True, where, joins_world=False)
    assert whole == shards
