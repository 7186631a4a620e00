"""The peak of a stage 3 step, predicted from the model: states + live weights + activations + gradients + scratch.

The allocator is asked after every operator of forward, backward and step. A chain of L layers with weights of W bytes
and outputs of A bytes, fp32 with Adam on N ranks:

    states         12 W L/N            weights, which are the masters, and two moments
    activations    A (L + 1) - A k     when k layers are through their backward: what tanh saved is the next one's input
    gradients      4 W k/N
    live weights   W (1 + ahead)       one layer, and what is gathered ahead
    scratch        W + 2 (W + W/N)     the gradient that autograd writes, and two on their way, with what comes in
                   + 3 A               gradients of activations

`F.linear` saves a view of its weight for each layer. Were that memory not given back, the peak would grow by W a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parity import heap

WIDTH, NUM_RANKS, SMALL, LARGE = 384, 2, 4, 12
WEIGHT_BYTES = 4 * WIDTH * WIDTH

pytestmark = pytest.mark.skipif(not heap.can_count(), reason="needs glibc's mallinfo2")


class AllocatorLog(TorchDispatchMode):
    """Remembers the most that the allocator had given out after any operator."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0

    def __torch_dispatch__(self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.peak_bytes = max(self.peak_bytes, heap.bytes_now())
        return result


class Setting(NamedTuple):
    """rows: of the batch, each 4 * WIDTH bytes of activations a layer. gathers_all: on purpose, around the step."""

    num_layers: int
    rows: int
    layers_ahead: int = 0
    gathers_all: bool = False

    @property
    def floor_bytes(self) -> float:
        """What is there at the worst moment of the backward, which begins or ends with it, without scratch."""
        outputs = 4 * WIDTH * self.rows
        states = 3 * WEIGHT_BYTES * self.num_layers / NUM_RANKS
        at_begin, at_end = outputs * (self.num_layers + 1), WEIGHT_BYTES * self.num_layers / NUM_RANKS + outputs
        return states + max(at_begin, at_end) + WEIGHT_BYTES * (1 + self.layers_ahead)

    @property
    def scratch_bytes(self) -> float:
        return WEIGHT_BYTES * (1 + 2 * (1 + 1 / NUM_RANKS)) + 3 * 4 * WIDTH * self.rows


def peak_of(setting: Setting) -> int:
    """Return the peak of the second step over what was held before there was a model."""
    import craken

    before = heap.bytes_in_use()
    layers = [(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(setting.num_layers)]
    model = nn.Sequential(*(module for pair in layers for module in pair))
    zero = {"stage": 3, "reduce_bucket_size": WIDTH * WIDTH, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {**zero, "stage3_prefetch_bucket_size": setting.layers_ahead * WIDTH * WIDTH},
    }
    engine, *_ = craken.initialize(model=model, config=config)
    x = torch.ones(setting.rows, WIDTH)
    engine.backward(engine(x).square().mean())
    engine.step()
    log = AllocatorLog()
    with craken.GatheredParameters(model.parameters()) if setting.gathers_all else contextlib.nullcontext(), log:
        engine.backward(engine(x).square().mean())
        engine.step()
    engine.destroy()
    return log.peak_bytes - before


FEW_ROWS, MANY_ROWS = 48, 384  # the peak is at the end of the backward, at its beginning


def peaks(settings: list[Setting]) -> list[int]:
    for rows in (FEW_ROWS, MANY_ROWS):
        peak_of(Setting(2, rows))  # imports, threads, caches, what products of such matrices need
    return [peak_of(setting) for setting in settings]


def test_the_peak_is_states_and_live_weights_and_activations_and_gradients(run_ranks) -> None:
    settings = [Setting(num_layers, rows) for rows in (FEW_ROWS, MANY_ROWS) for num_layers in (SMALL, LARGE)]
    others = [Setting(LARGE, MANY_ROWS, layers_ahead=1), Setting(LARGE, MANY_ROWS, gathers_all=True)]
    for measured in run_ranks(peaks, NUM_RANKS, settings + others):
        for setting, peak in zip(settings, measured, strict=False):
            assert setting.floor_bytes < peak < setting.floor_bytes + setting.scratch_bytes, setting
        for at in (0, 2):
            grown = settings[at + 1].floor_bytes - settings[at].floor_bytes
            assert measured[at + 1] - measured[at] == pytest.approx(grown, rel=0.02), settings[at]
        alone, ahead, all_whole = measured[3:]
        assert ahead - alone == pytest.approx(WEIGHT_BYTES, rel=0.2)
        assert all_whole - alone == pytest.approx((LARGE - 1) * WEIGHT_BYTES, rel=0.1), "the ruler sees whole weights"
