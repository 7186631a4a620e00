"""The class names DeepSpeed's users import: values recorded from the originals, and what clients rely on."""

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch

from craken.optim import deepspeed_names, takes_grad_scale

from .record_original_optimizers import run, start

RECORDED = json.loads(Path(__file__).with_name("original_optimizers.json").read_text())
NAMES = ["FusedAdam", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion", "FusedLion", "FusedLamb"]
HANDED_OVER = ["DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad", "DeepSpeedCPULion"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda c: f"{c['name']}-{c['params']}")
def test_adam_steps_as_the_original_does(case):
    param = torch.nn.Parameter(start())
    seen = run(getattr(deepspeed_names, case["name"])([param], **case["params"]), param)
    torch.testing.assert_close(torch.tensor(seen[0]), torch.tensor(case["first"]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.tensor(seen[-1]), torch.tensor(case["last"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", HANDED_OVER)
def test_groups_of_another_optimizer_stay_the_same_objects(name):
    weight = torch.nn.Parameter(torch.ones(4))
    given = torch.optim.AdamW([{"params": [weight], "lr": 0.5, "my_key": "kept"}, {"params": []}])
    group, empty = given.param_groups
    built = getattr(deepspeed_names, name)(given.param_groups, lr=0.1, weight_decay=0.0, adamw_mode=True)
    assert built.param_groups[0] is group
    assert built.param_groups[1] is empty
    assert group["lr"] == 0.5
    assert group["my_key"] == "kept"
    group["lr"] = 0.0
    weight.grad = torch.ones(4)
    built.step()
    assert weight.tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ["FusedAdam", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad"])
def test_handed_over_groups_run_fused_unless_they_say_otherwise(name):
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    given = torch.optim.AdamW([weights[0]])
    built = getattr(deepspeed_names, name)(given.param_groups)
    assert built.param_groups[0]["fused"] is True
    assert takes_grad_scale(built)
    slow = getattr(deepspeed_names, name)(torch.optim.AdamW([weights[1]], foreach=True).param_groups)
    assert not slow.param_groups[0]["fused"]


@pytest.mark.parametrize("name", NAMES)
def test_construction_touches_no_data(name):
    placeholder = torch.nn.Parameter(torch.empty(0))
    on_meta = torch.nn.Parameter(torch.empty(3, 4, device="meta"))
    built = getattr(deepspeed_names, name)([placeholder, on_meta])
    assert isinstance(built, torch.optim.Optimizer)
    assert not built.state


def test_adamw_mode_false_adds_the_decay_to_the_gradient():
    for decoupled in (True, False):
        mine, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
        built = deepspeed_names.DeepSpeedCPUAdam([mine], lr=0.1, weight_decay=0.5, adamw_mode=decoupled)
        plain = (torch.optim.AdamW if decoupled else torch.optim.Adam)([theirs], lr=0.1, weight_decay=0.5, fused=True)
        for param, optimizer in ((mine, built), (theirs, plain)):
            param.grad = torch.linspace(1, 2, 9)
            optimizer.step()
        assert torch.equal(mine, theirs)


def test_copies_keep_going_without_bias_correction():
    param = torch.nn.Parameter(torch.ones(3))
    other = copy.deepcopy(deepspeed_names.FusedAdam([param], lr=0.1, bias_correction=False))
    copied = other.param_groups[0]["params"][0]
    copied.grad = torch.ones(3)
    other.step()
    assert copied.tolist() == pytest.approx([1 - 0.1 * 0.1 / 0.001**0.5] * 3, rel=1e-5)


def test_signatures_are_deepspeeds():
    parameters = inspect.signature(deepspeed_names.DeepSpeedCPUAdam).parameters
    assert list(parameters)[:3] == ["model_params", "lr", "bias_correction"]
    assert {name: p.default for name, p in parameters.items() if name != "model_params"} == {
        "lr": 1e-3,
        "bias_correction": True,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "adamw_mode": True,
        "fp32_optimizer_states": True,
    }
