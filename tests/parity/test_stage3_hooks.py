"""Hooks that clients take off and put back on, around generation, and modules that come after `initialize`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs, two_paths, value
from tests.parity.test_stage3_forwards import WIDTH, Block, build


def remove_hooks(offload) -> None:
    """What TRL does before it generates."""
    for _, param in [*offload.module.named_parameters(), *offload.module.ds_external_parameters()]:
        param.ds_active_sub_modules.clear()
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def add_hooks(offload) -> None:
    """What TRL does after it."""
    if not offload.param_coordinator.is_invalid_trace():
        offload.param_coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


def generate_between_steps() -> None:
    from craken.comm import event_log
    from craken.zero import GatheredParameters, register_external_parameter

    pair = Pair(3, build("ties weights of two units"))
    offload = pair.optimizer.parameter_offload
    assert offload.module is pair.model
    register_external_parameter(pair.model, pair.model.last.up.weight)
    assert [name for name, _ in pair.model.ds_external_parameters()] == ["last.up.weight"]
    for step in range(3):
        pair.step_both(step)
        num_hooks = len(offload.forward_hooks)
        x = inputs(step, 0)
        with torch.no_grad(), GatheredParameters(pair.model.parameters()):
            remove_hooks(offload)
            with event_log() as events:
                outputs = [pair.model(x), pair.model(x[:1])]
                assert pair.model.first.up.weight.shape == (WIDTH, WIDTH)
            add_hooks(offload)
            assert not events
            torch.testing.assert_close(outputs, [pair.twin(x), pair.twin(x[:1])], rtol=1e-5, atol=1e-5)
        assert len(offload.forward_hooks) == num_hooks
        assert all(param.shape == (0,) for param in pair.model.parameters())
    pair.step_both(3)
    pair.assert_same_weights(atol=1e-5)
    with GatheredParameters(pair.model.parameters()):
        twin = copy.deepcopy(pair.model)
    torch.testing.assert_close(twin(inputs(0, 0)), pair.twin(inputs(0, 0)), rtol=1e-5, atol=1e-5)
    pair.close()


def test_hooks_can_be_taken_off_around_generation_and_put_back_on(run_ranks) -> None:
    run_ranks(generate_between_steps, 2)


def infer_without_optimizer() -> None:
    import craken
    from craken.zero import GatheredParameters

    model = two_paths()
    twin = copy.deepcopy(model)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "param_persistence_threshold": 0}}
    engine, offload, *_ = craken.initialize(model=model, config=config)
    assert offload is engine.optimizer
    assert not hasattr(offload, "parameter_offload")
    x = inputs(0, 0)
    with torch.no_grad():
        assert torch.equal(engine(x), twin(x))
        with GatheredParameters(model.parameters()):
            remove_hooks(offload)
            assert torch.equal(model(x), twin(x))
            add_hooks(offload)
        assert model.left.weight.shape == (0,)
        assert torch.equal(engine(x), twin(x))
    assert engine.get_lr() == []
    engine.destroy()


def test_an_engine_without_optimizer_has_its_hooks_in_the_optimizers_place(run_ranks) -> None:
    run_ranks(infer_without_optimizer, 2)


class Adapter(nn.Module):
    """Reads the weight of what it wraps, besides running it; and has one of its own, that nobody shards."""

    def __init__(self, base: nn.Module, *, is_built_as_shards: bool) -> None:
        from craken.zero import Init

        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.zeros(()), requires_grad=False)
        with Init(enabled=is_built_as_shards):  # the reads of which are watched for those who lend
            self.borrowed = nn.Linear(1, 1, bias=False)
        self.borrowed.weight = base.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.borrowed(x) + self.scale


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def adapt_later(*, are_built_as_shards: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(31)
        pair = Pair(3, Host())
    pair.step_both(0)
    for model in (pair.model, pair.twin):
        model.first = Adapter(model.first, is_built_as_shards=are_built_as_shards)
        model.last.extra = model.first.base.down.weight
    for step in range(1, 4):
        pair.step_both(step)
        assert all(param.shape in ((0,), ()) for param in pair.model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(pair.engine(inputs(9, 0)), pair.twin(inputs(9, 0)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value(pair.model.last.extra), pair.twin.last.extra, rtol=1e-5, atol=1e-5)
    assert error(pair.twin(inputs(0, 0))).isfinite()
    pair.close()


@pytest.mark.parametrize("are_built_as_shards", [False, True])
def test_modules_that_are_given_sharded_weights_later_read_them_whole(run_ranks, are_built_as_shards) -> None:
    run_ranks(adapt_later, 2, are_built_as_shards=are_built_as_shards)
