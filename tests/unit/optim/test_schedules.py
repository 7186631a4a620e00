"""The schedules against what DeepSpeed's own were recorded to do, and their errors."""

import json
from pathlib import Path

import pytest
import torch

from craken.optim import VALID_LR_SCHEDULES, build_scheduler

from .record_original_schedules import STEPS, build_optimizer, readings

RECORDED = json.loads(Path(__file__).with_name("original_schedules.json").read_text())


def close(got, expected):
    for mine, theirs in zip(got, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-11, abs=1e-14)


@pytest.mark.parametrize("case", RECORDED, ids=lambda c: f"{c['name']}-{c['optimizer']}-{list(c['params'].values())}")
def test_schedule_follows_the_original_step_by_step(case):
    optimizer = build_optimizer(case["optimizer"], case["num_groups"])
    schedule = build_scheduler(case["name"], case["params"], optimizer)
    close(readings(optimizer), case["built"])
    assert list(schedule.state_dict().items()) == [tuple(item) for item in case["built_state"]]
    expected = dict(zip(STEPS, case["steps"], strict=True))
    for index in range(STEPS[-1] + 1):
        schedule.step()
        if index in expected:
            close(readings(optimizer), expected[index])
    assert schedule.get_last_lr() == pytest.approx(case["last_lr"], rel=1e-11, abs=1e-14)
    schedule.step(3)
    close(readings(optimizer), case["rewound"])
    assert list(schedule.state_dict().items()) == [tuple(item) for item in case["state"]]


def adam(lr=0.05):
    return torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=lr)


def test_valid_schedules_are_the_five_of_deepspeed():
    assert set(VALID_LR_SCHEDULES) == {"LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"}


def test_resumed_schedule_goes_on_where_the_saved_one_stood():
    params = {"total_num_steps": 30, "warmup_num_steps": 7}
    straight, optimizer, resumed_optimizer = adam(), adam(), adam()
    reference = build_scheduler("WarmupDecayLR", params, straight)
    first = build_scheduler("WarmupDecayLR", params, optimizer)
    for _ in range(12):
        reference.step()
        first.step()
    second = build_scheduler("WarmupDecayLR", params, resumed_optimizer)
    second.load_state_dict(first.state_dict())
    for _ in range(12):
        reference.step()
        second.step()
        assert resumed_optimizer.param_groups[0]["lr"] == straight.param_groups[0]["lr"]


def test_one_cycle_says_that_nothing_was_written_yet():
    schedule = build_scheduler("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}, adam())
    with pytest.raises(AssertionError, match="need to call step"):
        schedule.get_last_lr()


def test_one_cycle_reports_the_betas_it_writes():
    optimizer = adam()
    schedule = build_scheduler(
        "OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 4}, optimizer
    )
    for _ in range(3):
        schedule.step()
        assert schedule.get_mom() == [optimizer.param_groups[0]["betas"]]
    assert optimizer.param_groups[0]["betas"] == (pytest.approx(0.825), 0.999)


def test_schedule_writes_a_tensor_rate_in_place():
    optimizer = adam(lr=torch.tensor(0.5))
    rate = optimizer.param_groups[0]["lr"]
    schedule = build_scheduler("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}, optimizer)
    schedule.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.125)


def test_whole_floats_count_as_steps():
    exact, from_float = adam(), adam()
    one = build_scheduler("WarmupLR", {"warmup_num_steps": 100}, exact)
    other = build_scheduler("WarmupLR", {"warmup_num_steps": 1e2}, from_float)
    for _ in range(50):
        one.step()
        other.step()
    assert one.get_last_lr() == other.get_last_lr()


def test_torch_schedules_are_built_by_name():
    optimizer = adam()
    schedule = build_scheduler("MultiStepLR", {"milestones": [2, 4], "gamma": 0.5}, optimizer)
    assert type(schedule) is torch.optim.lr_scheduler.MultiStepLR
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [0.0125]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("WarmupLr", {}, "did you mean 'WarmupLR'"),
        ("Nonsense", {}, "known: LRRangeTest, OneCycle"),
        ("WarmupLR", {"warmup_steps": 3}, "scheduler.params.warmup_steps .* 'warmup_num_steps'"),
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps must be a whole number of at least 1, got 0"),
        ("WarmupLR", {"warmup_num_steps": -4}, "at least 1, got -4"),
        ("WarmupLR", {"warmup_num_steps": 2.5}, "at least 1, got 2.5"),
        ("WarmupLR", {"warmup_num_steps": "10"}, "scheduler.params.warmup_num_steps must be a finite number"),
        ("WarmupLR", {"warmup_num_steps": "auto"}, "scheduler.params.warmup_num_steps is 'auto'"),
        ("WarmupLR", {"warmup_max_lr": "1e-3"}, "warmup_max_lr must be a number >= 0, got '1e-3'"),
        ("WarmupLR", {"warmup_max_lr": [0.1, 0.2]}, "warmup_max_lr has 2 values, expected one for each of the 1"),
        ("WarmupLR", {"warmup_type": "cosine"}, "warmup_type must be one of"),
        ("WarmupDecayLR", {"warmup_num_steps": 5}, "scheduler.params.total_num_steps is required"),
        ("WarmupDecayLR", {"total_num_steps": 0}, "total_num_steps must be a whole number"),
        ("OneCycle", {"cycle_min_lr": 0.1}, "scheduler.params.cycle_max_lr is required"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_momentum": 1}, "must be true or false, got 1"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size must be a whole number"),
        ("WarmupLR", {"warmup_min_lr": -0.1}, "warmup_min_lr must be a number >= 0, got -0.1"),
        ("WarmupCosineLR", {"total_num_steps": 9, "cos_min_ratio": -1}, "cos_min_ratio must be a number >= 0"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "decay_step_size": -1}, "decay_step_size must be"),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_stair_count": -1}, "stair_count must be"),
        ("LRRangeTest", {"lr_range_test_step_rate": -1}, "lr_range_test_step_rate must be a number >= 0"),
        ("ReduceLROnPlateau", {}, "needs a metric in step"),
        ("StepLR", {"gamma": 0.5}, "scheduler.params.step_size is required"),
    ],
)
def test_wrong_scheduler_section_is_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(name, params, adam())


def test_schedule_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="needs a torch optimizer, got int"):
        build_scheduler("WarmupLR", {}, 3)
