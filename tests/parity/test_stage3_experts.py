"""Weights that get gradients on some ranks only: experts chosen by the data, at stage 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs
from tests.parity.test_stage3_forwards import WIDTH, Block

EXPERTS = 4


class Experts(nn.Module):
    """Sends the whole batch through the expert that its first number chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(Block() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        chosen = int(x.detach().abs().sum() * 100) % EXPERTS
        return x + self.experts[chosen](x) * self.gate(x)[:, chosen : chosen + 1].sigmoid()


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Block(), Experts()]) for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block, experts in self.layers:
            x = experts(block(x))
        return self.head(x)


def mixture() -> Mixture:
    with torch.random.fork_rng():
        torch.manual_seed(21)
        return Mixture()


ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 20}
SPLIT = {**ZERO, "stage3_max_live_parameters": 100}  # no layer fits: without the mark, every expert is a unit


def train(zero: dict[str, Any], marks: bool, bare: bool) -> tuple[int, list[str]]:
    """Return how many experts were chosen, and what this rank sent in the last step."""
    from craken.comm import event_log
    from craken.zero import set_z3_leaf_modules

    model = mixture()
    if marks:
        assert len(set_z3_leaf_modules(model, [Experts])) == 3
    pair = Pair(3, model, config={"zero_optimization": zero})
    chosen = set()
    for experts in (layer[1] for layer in pair.twin.layers):
        experts.register_forward_pre_hook(
            lambda module, args: chosen.add(int(args[0].detach().abs().sum() * 100) % EXPERTS)
        )
    for step in range(6):
        with event_log() as events:
            loss = error(pair.engine(inputs(step, pair.rank)))
            loss.backward() if bare else pair.engine.backward(loss)
            pair.engine.step()
        assert all(param.shape == (0,) for param in pair.model.parameters())
        pair.twin_backward(step)
        pair.twin_step()
    pair.assert_same_weights(atol=2e-5)
    pair.close()
    return len(chosen), [f"{event.op} {event.label}" for event in events]


def assert_alike(by_rank: list[tuple[int, list[str]]]) -> None:
    """Ranks saw several experts chosen, and issued the same collectives in the same order, each group's sum once."""
    assert all(num_chosen > 1 for num_chosen, _ in by_rank)
    events = by_rank[0][1]
    assert all(other == events for _, other in by_rank)
    sums = [event for event in events if event.startswith("reduce_scatter")]
    assert len(sums) == len(set(sums))


MARKED_BY = {
    "a mark": (SPLIT, True),
    "a class in the config": ({**SPLIT, "leaf_module": {"classes": ["Experts"]}}, False),
    "names in the config": ({**SPLIT, "leaf_module": {"names": ["layers.0.1", "layers.1.1", "layers.2.1"]}}, False),
    "their layers' size": ({**SPLIT, "stage3_module_granularity_threshold": 60}, False),
    "fitting into a unit": (ZERO, False),
}


@pytest.mark.parametrize("bare", [False, True], ids=["engine", "bare"])
@pytest.mark.parametrize("how", MARKED_BY)
def test_ranks_may_choose_other_experts_of_a_module_gathered_as_one_by(run_ranks, how, bare) -> None:
    assert_alike(run_ranks(train, 2, *MARKED_BY[how], bare))


def test_four_ranks_may_choose_four_experts(run_ranks) -> None:
    assert_alike(run_ranks(train, 4, SPLIT, True, False))


def leaf_names() -> None:
    import craken
    from craken import zero

    model = mixture()
    with pytest.raises(ValueError, match="found none"):
        zero.set_z3_leaf_modules(model, [nn.Conv2d])
    experts = [layer[1] for layer in model.layers]
    assert zero.set_z3_leaf_modules(model, ["Experts"]) == zero.get_z3_leaf_modules(model) == experts
    assert all(module._z3_leaf for module in experts)
    assert zero.unset_z3_leaf_modules(model, [Experts]) == experts
    assert not any(zero.z3_leaf_module(module) for module in model.modules())
    assert zero.set_z3_leaf_modules_by_suffix(model, ["0.1"]) == experts[:1]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config["optimizer"] = {"type": "SGD", "params": {"lr": 0.1}}
    engine, *_ = craken.initialize(model=model, config=config)
    assert zero.z3_leaf_parameter(model.layers[0][1].gate.weight)
    assert not zero.z3_leaf_parameter(model.head.weight)
    engine.destroy()
    zero.set_z3_leaf_module(model.layers, True)
    with pytest.raises(ValueError, match="never runs itself"):
        craken.initialize(model=model, config=config)


def test_leaf_modules_are_marked_and_asked_for(run_ranks) -> None:
    run_ranks(leaf_names, 1)
