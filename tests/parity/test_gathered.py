"""`GatheredParameters` and weights that a forward uses though they are another module's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs, value

SMALL = {"stage": 3, "stage3_param_persistence_threshold": 0}


def engine_of(model: nn.Module, **zero: Any) -> Any:
    import craken

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "bf16": {"enabled": True},
        "zero_optimization": {**SMALL, **zero},
    }
    return craken.initialize(model=model, config=config)[0]


def chain() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


def one_of_a_group_each() -> None:
    """Two parameters of one group, gathered by two blocks: the inner one's edit stays, the outer one's goes."""
    from craken.zero import GatheredParameters

    model = chain()
    engine = engine_of(model)
    weight, bias = model[0].weight, model[0].bias
    (group,) = [group for group in engine.groups if any(param is weight for param in group.params)]
    assert any(param is bias for param in group.params), "expected both in one group"
    before = value(weight)
    with GatheredParameters(weight):
        weight.data.fill_(9.0)
        with GatheredParameters([bias, weight], modifier_rank=0):
            bias.data = torch.full((5,), float(dist.get_rank() + 2), dtype=bias.dtype)
        assert weight.shape == (5, 6)
    assert torch.equal(value(weight), before), "the outer block has no modifier"
    assert value(bias).unique().tolist() == [2.0]
    with GatheredParameters(bias, modifier_rank=1):
        bias.data.fill_(dist.get_rank() + 4)
        with GatheredParameters(weight):
            weight.data.fill_(9.0)
    assert torch.equal(value(weight), before), "the inner block has no modifier"
    assert value(bias).unique().tolist() == [5.0]
    engine.backward(engine(torch.ones(1, 6, dtype=torch.bfloat16)).float().sum())
    engine.step()
    assert value(bias).unique().tolist() == [5.0], "the master did not take the edit"
    engine.check_integrity()
    engine.destroy()


def test_who_gathered_a_parameter_first_answers_for_it(run_ranks) -> None:
    run_ranks(one_of_a_group_each, 2)


def only_rank_zero_nests() -> None:
    from craken.zero import GatheredParameters

    model = chain()
    engine = engine_of(model)
    with GatheredParameters(model.parameters(), modifier_rank=0):
        if dist.get_rank() == 0:
            with GatheredParameters(model[1].weight, modifier_rank=0):
                model[1].weight.data.fill_(3.0)
    assert value(model[1].weight).unique().tolist() == [3.0]
    engine.destroy()


def test_a_block_inside_of_another_may_run_on_one_rank_only(run_ranks) -> None:
    run_ranks(only_rank_zero_nests, 2)


def two_engines_at_once() -> None:
    from craken.zero import GatheredParameters

    first, second = chain(), chain()
    engines = [engine_of(first), engine_of(second, stage3_param_persistence_threshold=10)]
    pairs = [*zip(first.parameters(), second.parameters(), strict=True)]
    with GatheredParameters([param for pair in pairs for param in pair], modifier_rank=0):
        if dist.get_rank() == 0:
            for mine, theirs in pairs:
                mine.data.fill_(1.0)
                theirs.data.mul_(0.5).add_(mine.data)
    for one, other, plain in zip(first.parameters(), second.parameters(), chain().parameters(), strict=True):
        assert value(one).unique().tolist() == [1.0]
        assert torch.equal(value(other), plain.detach().bfloat16() * 0.5 + 1)
    for engine in engines:
        engine.check_integrity()
        engine.destroy()


def test_parameters_of_two_engines_are_edited_together(run_ranks) -> None:
    run_ranks(two_engines_at_once, 2)


def always_whole() -> None:
    """Parameters under the persistence threshold, trained and frozen, and what clients read of them."""
    from craken.zero import GatheredParameters, ZeroParamStatus

    model = chain()
    model[0].weight.requires_grad_(False)
    engine = engine_of(model, stage3_param_persistence_threshold=10_000)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        assert param.ds_status is ZeroParamStatus.AVAILABLE, name
        assert param.ds_shape == param.shape
        assert param.ds_numel == param.numel()
    assert len({param.ds_id for param in model.parameters()}) == 4
    block = GatheredParameters(model.parameters(), modifier_rank=0)
    block.__enter__()
    for param in model.parameters():
        param.data.fill_(dist.get_rank())
    block.__exit__(KeyError, KeyError(), None)
    with GatheredParameters(model.parameters()):
        for param in model.parameters():
            param.data = torch.zeros_like(param)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters()), "an edit stayed"
    with GatheredParameters(model.parameters(), modifier_rank=1):
        for param in model.parameters():
            param.data.fill_(dist.get_rank() + 1)
    assert all(param.unique().tolist() == [2.0] for param in model.parameters())
    engine.backward(engine(torch.ones(1, 6, dtype=torch.bfloat16)).float().sum())
    engine.step()
    assert all(param.unique().tolist() == [2.0] for param in model.parameters()), "the master did not take the edit"
    engine.check_integrity()
    engine.destroy()


def test_edits_of_parameters_that_stay_whole_follow_the_same_rules(run_ranks) -> None:
    run_ranks(always_whole, 2)


def wrong_use() -> None:
    from craken.zero import GatheredParameters

    model = chain()
    engine = engine_of(model)
    first, last = model[0].weight, model[1].weight
    before = value(first)
    block = GatheredParameters(first, modifier_rank=0)
    block.__enter__()
    if dist.get_rank() == 0:
        first.data = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"\(2, 2\) in place of \(5, 6\)"):
        block.__exit__(None, None, None)
    with pytest.raises(ValueError, match="rank from 0 to 1"):  # before anything is gathered
        GatheredParameters(first, modifier_rank=2)
    with GatheredParameters(nn.ParameterList([first])):
        assert first.shape == (5, 6)
    for passed_over in ({"weight", first}, [("extra", "state"), torch.ones(1)]):  # as values of a state dict
        with GatheredParameters(passed_over):
            pass
    with GatheredParameters([model], enabled=False):
        pass
    for mistaken in (model, [model[0]], model.named_parameters(), "weight"):
        with pytest.raises(TypeError, match=r"pass model\.parameters\(\)"):
            GatheredParameters(mistaken)
    outer, inner = GatheredParameters([first, last]), GatheredParameters(first)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(RuntimeError, match="opposite order"):
        outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert first.shape == last.shape == (0,)
    assert torch.equal(value(first), before)
    with GatheredParameters(None), GatheredParameters([], modifier_rank=0), GatheredParameters(first, enabled=False):
        assert first.shape == (0,)
    engine.check_integrity()
    engine.destroy()


def test_wrong_use_is_refused_on_all_ranks_and_leaves_nothing_behind(run_ranks) -> None:
    run_ranks(wrong_use, 2)


def replace_inside() -> None:
    from craken.zero import GatheredParameters

    model = chain()
    engine = engine_of(model)
    old = model[1].weight
    with GatheredParameters([old, model[1].bias], modifier_rank=0):
        model[1].weight = nn.Parameter(old.data[:2].clone())
    assert old.shape == (0,)
    assert model[1].weight.shape == (2, 5)
    engine.destroy()


def test_a_module_may_get_another_parameter_inside(run_ranks) -> None:
    run_ranks(replace_inside, 2)


class Penalised(nn.Module):
    """Two layers, and a penalty on the first one's weight, which its forward reads in ways that vary."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 5)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        from craken.zero import GatheredParameters

        y = self.head(self.body(x))
        if self.way == "gathered":
            with GatheredParameters(self.body.weight, fwd_module=self):
                return y + (self.body.weight @ self.body.weight.T).square().mean()
        if self.way == "function":
            return y + Square.apply(self.kept[0])
        return y + (self.kept[0] @ self.kept[0].T).square().mean()


class Square(torch.autograd.Function):
    """Gathers what it needs, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        from craken.zero import GatheredParameters

        ctx.save_for_backward(weight)
        with GatheredParameters(weight):
            return weight.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from craken.zero import GatheredParameters

        (weight,) = ctx.saved_tensors
        with GatheredParameters(weight):
            return grad * 2 * weight.detach()


def read_elsewhere(way: str) -> None:
    from craken.zero import GatheredParameters, register_external_parameter

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Penalised(way)
    if way == "function":
        model.body.weight.requires_grad_(False)
    if way == "registered before":
        register_external_parameter(model, model.body.weight)
    pair = Pair(3, model)
    # not an attribute that the forward reads
    pair.model.kept, pair.twin.kept = [model.body.weight], [pair.twin.body.weight]
    if way == "registered":
        register_external_parameter(model, model.body.weight)
    if way == "forward module":
        with GatheredParameters(model.body.weight, fwd_module=model):
            pass
    for step in range(3):
        pair.step_both(step)
    assert all(param.shape == (0,) for param in model.parameters())
    pair.assert_same_weights(atol=1e-6)
    pair.close()


@pytest.mark.parametrize("way", ["gathered", "function", "registered", "registered before", "forward module"])
def test_a_forward_may_use_weights_of_another_module(run_ranks, way) -> None:
    run_ranks(read_elsewhere, 2, way)


def gathering_fails() -> None:
    """The second of two groups cannot be gathered: the first is let go of, and both can be gathered again."""
    from craken.zero import GatheredParameters

    model = chain()
    engine = engine_of(model)
    before = [value(param) for param in model.parameters()]
    weights = engine.groups[1].weights

    def fail() -> None:
        raise MemoryError("no room")

    bring_own, weights._bring_own = weights._bring_own, fail
    for modifier in (None, 0):
        block = GatheredParameters(model.parameters(), modifier_rank=modifier)
        with pytest.raises(MemoryError, match="no room"):
            block.__enter__()
        assert all(param.shape == (0,) for param in model.parameters())
        assert weights.num_bytes == engine.groups[0].weights.num_bytes == 0
    weights._bring_own = bring_own
    for param, values in zip(model.parameters(), before, strict=True):
        assert torch.equal(value(param), values)
    with GatheredParameters(model[1].weight, modifier_rank=0):
        model[1].weight.data.fill_(3.0)
    assert value(model[1].weight).unique().tolist() == [3.0], "a block that is gone answers for it"
    engine.check_integrity()
    engine.destroy()


def test_a_block_that_could_not_begin_leaves_nothing_gathered(run_ranks) -> None:
    run_ranks(gathering_fails, 2)


def registering() -> None:
    from craken.zero import external_parameters, register_external_parameter, unregister_external_parameter

    model = chain()
    for _ in range(2):
        register_external_parameter(model, model[0].weight)
    assert external_parameters(model) == [model[0].weight]
    unregister_external_parameter(model, model[0].weight)
    assert external_parameters(model) == []
    assert not model._forward_pre_hooks
    with pytest.raises(ValueError, match="was not registered"):
        unregister_external_parameter(model, model[0].weight)
    with pytest.raises(ValueError, match="expected a torch.nn.Module and a torch.nn.Parameter"):
        register_external_parameter(model, torch.ones(2))


def test_registering_twice_counts_once_and_can_be_undone(run_ranks) -> None:
    run_ranks(registering, 1)


def a_model_goes() -> None:
    pair = Pair(3, chain())
    pair.engine.backward(error(pair.engine(inputs(0, pair.rank))))
    pair.engine.step()
    weight, shard = weakref.ref(pair.model[0].weight), weakref.ref(pair.engine.groups[0].weights)
    pair.close()
    del pair
    while gc.collect():  # what a graph of autograd's hides from the collector comes to light layer by layer
        pass
    assert weight() is None
    assert shard() is None


def test_a_sharded_model_goes_with_its_last_reference(run_ranks) -> None:
    run_ranks(a_model_goes, 2)


def copies() -> None:
    import copy
    import io
    import pickle

    from craken.zero import GatheredParameters

    model = chain()
    engine = engine_of(model)
    with GatheredParameters(model.parameters()):
        twin = copy.deepcopy(model[0])
        plain = pickle.loads(pickle.dumps(model[0].weight))
        torch.save(model.state_dict(), io.BytesIO())
    assert twin.weight.shape == plain.shape == (5, 6)
    assert not hasattr(twin.weight, "ds_shape")
    with GatheredParameters(plain):
        assert plain.shape == (5, 6)
    engine.destroy()


def test_a_copy_of_a_gathered_parameter_is_an_ordinary_one(run_ranks) -> None:
    run_ranks(copies, 2)
