"""Layers of bitsandbytes under stage 3: 4-bit weights are sharded, 8-bit ones stay whole, and both stay right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.clients


def quantised_model() -> Any:
    import bitsandbytes as bnb

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            four = {"compute_dtype": torch.bfloat16, "compress_statistics": True}
            self.first = bnb.nn.Linear4bit(128, 256, bias=False, quant_storage=torch.bfloat16, **four)
            self.second = bnb.nn.Linear4bit(256, 128, bias=False, quant_storage=torch.uint8, **four)
            self.eight = bnb.nn.Linear8bitLt(128, 128, bias=False, has_fp16_weights=False)
            self.head = nn.Linear(128, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).relu()).to(torch.bfloat16)
            return self.head(x + self.eight(x).to(x.dtype))

    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    model.head.requires_grad_(True)
    return model.to("cpu")  # quantises


def forwards_of_all_kinds() -> list[int]:
    import craken

    model = quantised_model()
    twin = copy.deepcopy(model)
    twin.head.to(torch.bfloat16)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = craken.initialize(model=model, config=config)
    x = torch.randn(2, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = twin(x)
    for _ in range(2):
        engine.eval()
        with torch.no_grad():
            torch.testing.assert_close(engine(x), expected, rtol=0.02, atol=0.02)
        engine.train()
        output = engine(x)
        torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)
        engine.backward(output.float().square().mean())
        engine.step()
    held = [model.first.weight.numel(), model.second.weight.numel(), model.eight.weight.numel()]
    assert type(model.first.weight).__name__ == "Params4bit"
    engine.destroy()
    return held


def test_quantised_layers_are_right_in_training_and_evaluation(run_ranks) -> None:
    for first, second, eight in run_ranks(forwards_of_all_kinds, 2, timeout_s=120.0):
        assert first == second == 0, "4-bit weights are not sharded"
        assert eight == 128 * 128
