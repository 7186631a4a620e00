"""What is handed to initialize is checked before anything is built."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import craken
from craken.engine.request import Request, find_config

CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def test_config_is_found_in_each_place():
    assert find_config(CONFIG, None, None) is CONFIG
    assert find_config(None, CONFIG, None) is CONFIG
    assert find_config(None, None, SimpleNamespace(deepspeed_config="a.json")) == "a.json"


def test_no_config_says_how_to_give_one():
    with pytest.raises(ValueError, match="no config: expected initialize\\(config="):
        find_config(None, None, SimpleNamespace(deepspeed_config=None))


def test_two_different_configs_are_named():
    with pytest.raises(ValueError, match="two different configs: config and args.deepspeed_config"):
        find_config(CONFIG, None, SimpleNamespace(deepspeed_config="a.json"))


ON_DISK = {"device": "nvme", "nvme_path": "/dev/null/swap"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "needs model=: expected a torch.nn.Module, got None"),
        ({"model": nn.Linear}, "expected a torch.nn.Module, got the class Linear"),
        ({"model": "gpt2"}, "expected a torch.nn.Module, got a str"),
        ({"optimizer": 3}, "optimizer: expected a torch.optim.Optimizer or a function .* got a int"),
        ({"optimizer": lambda params: 3}, "the function returned a int, expected a torch optimizer"),
        ({"lr_scheduler": torch.optim.lr_scheduler.StepLR}, "got the class StepLR; expected an instance"),
        ({"model": nn.ReLU()}, "nothing to train: of the model's 0 parameters"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "nothing to train: of the model's 2 parameters"),
        ({"model_parameters": iter(())}, "model_parameters is empty"),
        ({"model_parameters": nn.Linear(3, 3).parameters()}, "holds a parameter of shape .* not in the model"),
        ({"mpu": object()}, "mpu=...\\) does not work yet"),
        ({"config": None}, "no config"),
        ({"config": "missing.json"}, "missing.json"),
        (
            {"config": {**CONFIG, "zero_optimization": {"stage": 3, "offload_param": ON_DISK}}},
            "cannot swap to /dev/null/swap: .*name a folder on a local disk",
        ),
        ({"config": {"optimizer": CONFIG["optimizer"]}}, "train_batch_size"),
        ({"config": {**CONFIG, "scheduler": {"type": "WarmupLRR"}}}, "WarmupLR"),
        ({"config": {**CONFIG, "optimizer": {"type": "AdamV"}}}, 'got "AdamV"; did you mean "Adam"'),
        ({"training_data": [1], "config": {**CONFIG, "train_micro_batch_size_per_gpu": 2}}, "has 1 samples"),
    ],
)
def test_wrong_arguments_say_what_was_expected(arguments, message):
    given = {"model": nn.Linear(2, 2), "config": CONFIG, **arguments}
    try:
        with pytest.raises((ValueError, NotImplementedError, OSError), match=message):
            craken.initialize(**given)
    finally:
        craken.comm.shutdown()


def test_a_schedule_without_an_optimizer_is_passed_over_and_step_says_what_is_missing():
    params = {"warmup_num_steps": 1, "total_num_steps": 0}  # as clients leave it that only evaluate
    config = {"train_batch_size": 1, "scheduler": {"type": "WarmupDecayLR", "params": params}}
    try:
        engine, _, _, scheduler = craken.initialize(model=nn.Linear(2, 2), config=config)
        assert scheduler is None
        with pytest.raises(RuntimeError, match="step\\(\\) on an engine without an optimizer"):
            engine.step()
        with pytest.raises(ValueError, match="total_num_steps"):
            craken.initialize(model=nn.Linear(2, 2), config={**CONFIG, **config})
    finally:
        craken.comm.shutdown()


def test_a_parameter_in_two_groups_is_named():
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.weight, model.bias]}]
    try:
        with pytest.raises(ValueError, match="parameter weight is in optimizer groups 0 and 1"):
            craken.initialize(model=model, model_parameters=groups, config=CONFIG)
    finally:
        craken.comm.shutdown()


def test_a_request_is_frozen():
    with pytest.raises(AttributeError):
        Request(nn.Linear(1, 1)).model = nn.ReLU()
