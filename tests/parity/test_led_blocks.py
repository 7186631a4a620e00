"""Blocks that one rank leads: what its code reads besides is whole, on ranks that run the same code and on others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.parity.side_by_side import value


def built(num_layers: int, width: int = 4) -> nn.Sequential:
    """Return layers that are shards, weight i full of i."""
    from craken.zero import Init

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with Init(config_dict_or_path=config):
        layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_layers)))
    from craken import GatheredParameters

    with GatheredParameters(layers.parameters(), modifier_rank=0), torch.no_grad():
        for index, layer in enumerate(layers):
            layer.weight.fill_(index)
    return layers


def all_ranks_alike(layers: nn.Sequential, edit: Callable[[int], None]) -> None:
    for index in (2, 1, 3):
        edit(index)


def first_rank_alone(layers: nn.Sequential, edit: Callable[[int], None]) -> None:
    if dist.get_rank() == 0:
        all_ranks_alike(layers, edit)


def in_another_order(layers: nn.Sequential, edit: Callable[[int], None]) -> None:
    for index in (2, 1, 3) if dist.get_rank() == 0 else (3, 2):
        edit(index)


def also_elsewhere(layers: nn.Sequential, edit: Callable[[int], None]) -> None:
    """What only another rank reads stays a placeholder there."""
    all_ranks_alike(layers, edit)
    if dist.get_rank() == 1:
        assert layers[4].weight.shape == (0,)


def run_block(how: str, gathers_first: bool) -> None:
    from craken import GatheredParameters

    layers = built(5)
    seen: list[Tensor] = []

    def edit(index: int) -> None:
        seen.append(layers[index].weight.detach().clone())
        layers[index].weight.add_(10.0 if dist.get_rank() == 0 else 99.0)

    with torch.no_grad(), GatheredParameters(layers[0].weight if gathers_first else [], modifier_rank=0):
        globals()[how](layers, edit)
    assert all(weight.shape == (4, 4) for weight in seen)
    assert all(layer.weight.shape == (0,) for layer in layers)
    whole = [value(layer.weight) for layer in layers]
    assert [weight.unique().tolist() for weight in whole] == [[0.0], [11.0], [12.0], [13.0], [4.0]]


@pytest.mark.parametrize("how", ["all_ranks_alike", "first_rank_alone", "in_another_order", "also_elsewhere"])
def test_what_the_leading_rank_reads_is_whole_and_its_edits_stay(run_ranks, how) -> None:
    run_ranks(run_block, 2, how, True)


def after_a_model_of_its_own() -> None:
    """The first rank has sharded a model that the second knows nothing of."""
    from craken.zero import Init

    alone = dist.new_group([0])
    if dist.get_rank() == 0:
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        with Init(data_parallel_group=alone, config_dict_or_path=config):
            assert nn.Linear(4, 4).weight.shape == (0,)
    run_block("first_rank_alone", True)


def test_ranks_mean_the_same_weights_whatever_else_one_of_them_has(run_ranks) -> None:
    run_ranks(after_a_model_of_its_own, 2)


@pytest.mark.parametrize("how", ["all_ranks_alike", "first_rank_alone"])
def test_a_block_around_nothing_lends_too(run_ranks, how) -> None:
    run_ranks(run_block, 2, how, False)


def block_in_one_that_has_all() -> None:
    """Such a block may be the first rank's alone: it has nothing to tell the others."""
    from craken import GatheredParameters

    layers = built(2)
    with torch.no_grad(), GatheredParameters(layers.parameters()):
        if dist.get_rank() == 0:
            with GatheredParameters(layers[1].weight, modifier_rank=0):
                assert layers[1].weight.unique().tolist() == [1.0]
    assert value(layers[1].weight).unique().tolist() == [1.0]


def test_a_block_in_one_that_has_all_is_silent(run_ranks) -> None:
    run_ranks(block_in_one_that_has_all, 2)


def read_many() -> None:
    """Read 12 MB of weights in a block: the oldest loans go before all are whole."""
    from craken import GatheredParameters

    layers = built(12, width=1024)
    most = 0
    with torch.no_grad(), GatheredParameters(layers[0].weight, modifier_rank=0):
        if dist.get_rank() == 0:
            for index in range(1, 12):
                assert layers[index].weight.add_(1.0).mean() == index + 1
                most = max(most, sum(layer._parameters.get("weight").numel() for layer in layers))
    assert dist.get_rank() > 0 or most == (8 + 1) * 1024**2, f"{most} elements were whole at one time"
    for index in range(1, 12):
        assert value(layers[index].weight).mean() == index + 1


def test_a_block_that_reads_all_of_a_model_does_not_hold_it(run_ranks) -> None:
    run_ranks(read_many, 2)


def inner_block(is_alone: bool, is_read_before: bool) -> None:
    """What a block inside asks for is lent by the outer one, and stays however much is read meanwhile."""
    from craken import GatheredParameters

    layers = built(14, width=1024)
    with torch.no_grad(), GatheredParameters(layers[0].weight, modifier_rank=0):
        if dist.get_rank() == 0 or not is_alone:
            assert not is_read_before or layers[1].weight.shape == (1024, 1024)
            with GatheredParameters([layers[2].weight, layers[1].weight], modifier_rank=0):
                for layer in layers[3:]:
                    layer.weight.add_(1.0)
                assert layers[1].weight.add_(1.0).mean() == 2
                assert layers[2].weight.add_(1.0).mean() == 3
    assert [value(layer.weight).mean().item() for layer in layers] == [0, *range(2, 15)]


@pytest.mark.parametrize("is_read_before", [False, True], ids=["new", "read before"])
@pytest.mark.parametrize("is_alone", [False, True], ids=["on all ranks", "on one"])
def test_a_block_inside_keeps_what_it_asks_for(run_ranks, is_alone, is_read_before) -> None:
    run_ranks(inner_block, 2, is_alone, is_read_before)


def after_initialize() -> None:
    """With an engine, blocks lend nothing; a copy of the model is plain."""
    import copy

    import craken

    layers = built(3)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    copied = copy.deepcopy(layers)
    assert all(type(layer._parameters) is dict for layer in copied)
    engine, *_ = craken.initialize(model=layers, config=config)
    with craken.GatheredParameters(layers[0].weight, modifier_rank=0):
        assert layers[1].weight.shape == (0,)
    engine.destroy()
    assert all(type(layer._parameters) is dict for layer in layers)


def test_an_engine_ends_the_lending(run_ranks) -> None:
    run_ranks(after_initialize, 2)


def after_a_refusal() -> None:
    """Settings are refused, some of them only once the model is looked at: it is lent as before, and can be trained."""
    import craken

    layers = built(3)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    wrong_leaf = {**config, "zero_optimization": {"stage": 3, "leaf_module": {"classes": ["Nowhere"]}}}
    for refused, optimizer in ((config, lambda params: "none"), (wrong_leaf, None)):
        with pytest.raises(ValueError, match="expected a torch optimizer|Nowhere"):
            craken.initialize(model=layers, config=refused, optimizer=optimizer)
        with craken.GatheredParameters(layers[0].weight, modifier_rank=0):
            assert layers[1].weight.unique().tolist() == [1.0]
        assert layers[1].weight.shape == (0,)
    engine, *_ = craken.initialize(model=layers, config=config)
    assert engine(torch.ones(1, 4)).tolist() == [[0.0] * 4]
    engine.destroy()


def test_a_refused_config_leaves_the_lending_as_it_was(run_ranks) -> None:
    run_ranks(after_a_refusal, 2)


def failing_block() -> None:
    from craken import GatheredParameters

    layers = built(3)
    with contextlib.suppress(RuntimeError), GatheredParameters(layers[0].weight, modifier_rank=0):
        layers[1].weight.data.add_(10)
        raise RuntimeError("on purpose")
    assert all(layer.weight.shape == (0,) for layer in layers)
    assert value(layers[1].weight).unique().tolist() == [1.0]
    with GatheredParameters(layers[0].weight, modifier_rank=0):
        layers[1].weight.data.add_(10)
    assert value(layers[1].weight).unique().tolist() == [11.0]


def test_a_block_that_fails_on_all_ranks_lets_go_of_its_loans(run_ranks) -> None:
    run_ranks(failing_block, 2)
