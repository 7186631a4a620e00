"""Stage 3 without an optimizer: the weights are shards, forwards give what the plain model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.parity.side_by_side import inputs
from tests.parity.test_stage3 import tower

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100},
}


def infer(built_as_shards: bool, frozen: bool) -> None:
    import craken
    from craken.comm import event_log
    from craken.zero import GatheredParameters, Init

    plain = tower().eval()
    with Init(config_dict_or_path=CONFIG, enabled=built_as_shards):
        model = tower().eval()
    model.requires_grad_(not frozen)
    engine, optimizer, loader, scheduler = craken.initialize(model=model, config=CONFIG)
    assert loader is None
    assert scheduler is None
    assert optimizer is engine.optimizer
    assert optimizer.module is model
    assert not hasattr(optimizer, "parameter_offload")
    with torch.no_grad():
        for step in range(2):
            x = inputs(step, 0)
            with event_log() as events:
                assert torch.equal(engine(x), plain(x))
            assert {event.op for event in events} == {"all_gather"}
            assert len(events) == len(engine.parts.layers.frozen)
    for name, param in model.named_parameters():
        whole = plain.get_parameter(name)
        assert param.shape == (whole.shape if whole.numel() <= 100 else (0,)), name
        assert param.requires_grad is not frozen
    assert engine(inputs(3, 0)).shape == (3, 5)  # with gradients, that nobody takes
    with pytest.raises(RuntimeError, match="engine without an optimizer"):
        engine.step()
    with GatheredParameters(model.parameters(), modifier_rank=0):
        for param in model.parameters():
            param.data.mul_(0.5)
    for param in plain.parameters():
        param.data.mul_(0.5)
    with torch.no_grad():
        assert torch.equal(engine(inputs(4, 0)), plain(inputs(4, 0)))
    engine.destroy()


@pytest.mark.parametrize("built_as_shards", [False, True], ids=["built whole", "built as shards"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_model_without_an_optimizer_is_sharded_too(run_ranks, built_as_shards, frozen) -> None:
    run_ranks(infer, 2, built_as_shards, frozen)


def infer_then_train() -> None:
    """What preference training does: a forward over the data under an inference engine, then training."""
    import craken
    from tests.parity.side_by_side import Pair

    model = tower()
    first, *_ = craken.initialize(model=model, config=CONFIG)
    with torch.no_grad():
        before = first(inputs(0, 0))
    pair = Pair(3, model)
    with torch.no_grad():
        assert torch.equal(pair.engine(inputs(0, 0)), before)
    for step in range(2):
        pair.step_both(step)
    pair.assert_same_weights(atol=1e-5)  # Adam divides roundings by small gradients
    pair.close()


def test_an_inference_engine_may_be_followed_by_a_training_engine(run_ranks) -> None:
    run_ranks(infer_then_train, 2)


def all_small() -> None:
    """Every parameter is under the threshold: nothing is sharded, and clients find what they look for."""
    import craken

    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3}}
    engine, offload, *_ = craken.initialize(model=nn.Linear(2, 2), config=config)
    assert engine.module.weight.ds_status.name == "AVAILABLE"
    trained = {**config, "optimizer": {"type": "AdamW"}}
    training, optimizer, *_ = craken.initialize(model=nn.Linear(2, 2), config=trained)
    for one in (offload, optimizer.parameter_offload):
        assert list(one.module.ds_external_parameters()) == []
        for hook in one.forward_hooks:
            hook.remove()
        one._register_deepspeed_module(one.module)
    assert engine(torch.ones(1, 2)).shape == (1, 2)
    for one in (engine, training):
        one.destroy()


def test_a_model_of_small_parameters_alone_has_the_object_too(run_ranks) -> None:
    run_ranks(all_small, 2)


def below_stage_3() -> None:
    import craken

    engine, optimizer, *_ = craken.initialize(model=nn.Linear(2, 2), config={"train_batch_size": 2})
    assert optimizer is None
    assert engine(torch.ones(1, 2)).shape == (1, 2)
    engine.destroy()


def test_below_stage_3_there_is_no_object_in_the_optimizers_place(run_ranks) -> None:
    run_ranks(below_stage_3, 2)
