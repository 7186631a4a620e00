"""Activation checkpointing by call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from craken import recompute


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with mock.patch.object(recompute, "_settings", recompute._Settings()):
        yield


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout, self.num_runs = nn.Linear(4, 4), nn.Dropout(0.5), 0

    def forward(self, x: Tensor, *, scale: Tensor, note: str = "") -> Tensor:
        self.num_runs += 1
        return self.dropout(self.layer(x).tanh()) * scale


def gradients(call: Any, module: Counted) -> list[Tensor]:
    torch.manual_seed(1)
    x, scale = torch.randn(3, 4, requires_grad=True), torch.full((), 2.0, requires_grad=True)
    call(module, x, scale=scale, note="a keyword that is no tensor").square().sum().backward()
    grads = [x.grad, scale.grad, module.layer.weight.grad]
    module.zero_grad()
    return grads


@pytest.mark.parametrize("on_host", [False, True])
def test_a_stretch_runs_again_with_the_same_numbers(on_host) -> None:
    module = Counted()
    expected = gradients(lambda module, x, **kw: module(x, **kw), module)
    assert not recompute.is_configured()
    recompute.configure(None, checkpoint_in_cpu=on_host)
    assert recompute.is_configured()
    with mock.patch.object(torch.autograd.graph, "save_on_cpu", wraps=torch.autograd.graph.save_on_cpu) as moved:
        got = gradients(recompute.checkpoint, module)
    assert moved.called is on_host
    assert module.num_runs == 3
    for ours, plain in zip(got, expected, strict=True):
        assert torch.equal(ours, plain)
    recompute.reset()


def test_the_config_is_read_and_what_has_no_effect_is_said() -> None:
    config = {"activation_checkpointing": {"cpu_checkpointing": True, "partition_activations": True}}
    config["train_batch_size"] = 1
    with mock.patch.object(recompute, "warn_once") as said:
        recompute.configure(None, config, profile=True)
        assert recompute._settings.waits_on_host
        recompute.configure(None, config, checkpoint_in_cpu=False, partition_activations=False)
    assert not recompute._settings.waits_on_host
    first, second = (call.args[0] for call in said.call_args_list)
    assert "partition_activations=..." in first
    assert "torch.profiler" in second
