"""Records what DeepSpeed's own schedules do, as `original_schedules.json` beside this file.

Run by hand, in an environment that has DeepSpeed 0.19.6:

    python tests/unit/optim/record_original_schedules.py
"""

import json
from pathlib import Path

import torch

STEPS = sorted({*range(24), *range(24, 420, 9), *range(38, 43), *range(97, 103), *range(297, 303)})
WARMUP = [
    {"warmup_max_lr": 0.01},
    {"warmup_max_lr": 0.01, "warmup_num_steps": 10},
    {"warmup_max_lr": 0.01, "warmup_num_steps": 1},
    {"warmup_max_lr": 0.01, "warmup_num_steps": 2},
    {"warmup_max_lr": 0.01, "warmup_num_steps": 3, "warmup_type": "linear"},
    {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 100, "warmup_type": "linear"},
    {"warmup_min_lr": 0.001, "warmup_max_lr": 0.02, "warmup_num_steps": 100, "warmup_type": "log"},
    {"warmup_min_lr": 0.02, "warmup_max_lr": 0.001, "warmup_num_steps": 50},
    {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [0.01, 0.2], "warmup_num_steps": 20},
    {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 30, "last_batch_iteration": 17},
    {"warmup_num_steps": 25},
    {"warmup_max_lr": 0.01, "warmup_num_steps": 1, "warmup_type": "linear"},
    {"warmup_num_steps": 25, "warmup_type": "linear", "warmup_min_lr": 0.005},
]
DECAY = [
    {"total_num_steps": 300},
    {"total_num_steps": 300, "warmup_num_steps": 50},
    {"total_num_steps": 300, "warmup_num_steps": 50, "warmup_type": "linear", "warmup_max_lr": 0.1},
    {"total_num_steps": 60, "warmup_num_steps": 20, "warmup_min_lr": 0.002, "warmup_max_lr": 0.01},
    {"total_num_steps": 20, "warmup_num_steps": 40, "warmup_max_lr": 0.01},
    {"total_num_steps": 40, "warmup_num_steps": 40, "warmup_max_lr": 0.01, "warmup_type": "linear"},
    {"total_num_steps": 300, "warmup_num_steps": 1, "warmup_max_lr": 0.01},
    {"total_num_steps": 300, "warmup_num_steps": 50, "warmup_min_lr": [0.0, 0.01], "warmup_max_lr": [0.1, 0.2]},
    {"total_num_steps": 300, "warmup_num_steps": 50, "last_batch_iteration": 120},
]
COSINE = [
    {"total_num_steps": 300},
    {"total_num_steps": 300, "warmup_num_steps": 30},
    {"total_num_steps": 300, "warmup_num_steps": 30, "warmup_type": "linear"},
    {"total_num_steps": 300, "warmup_num_steps": 30, "warmup_min_ratio": 0.2, "cos_min_ratio": 0.1},
    {"total_num_steps": 100, "warmup_num_steps": 30, "warmup_min_ratio": 0.5, "cos_min_ratio": 0.5},
    {"total_num_steps": 100, "warmup_num_steps": 1, "cos_min_ratio": 0.0},
    {"total_num_steps": 20, "warmup_num_steps": 40},
    {"total_num_steps": 40, "warmup_num_steps": 40},
    {"total_num_steps": 41, "warmup_num_steps": 40},
    {"total_num_steps": 300, "warmup_num_steps": 30, "warmup_type": "linear", "last_batch_iteration": 44},
]
CYCLE = [
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1},
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 50},
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 50, "cycle_second_step_size": 100},
    {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 40,
        "decay_lr_rate": 0.5,
        "decay_step_size": 10,
    },
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 40, "decay_lr_rate": 0.01},
    {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 40,
        "decay_step_size": 5,
        "decay_mom_rate": 0.1,
        "decay_lr_rate": 0.2,
        "cycle_min_mom": 0.7,
        "cycle_max_mom": 0.95,
    },
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 40, "cycle_momentum": False},
    {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 40,
        "cycle_first_stair_count": 4,
        "cycle_second_stair_count": 8,
    },
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 40, "cycle_first_stair_count": 5},
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 21, "cycle_first_stair_count": 3},
    {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 40,
        "cycle_second_step_size": 60,
        "cycle_first_stair_count": 5,
        "cycle_second_stair_count": 0,
    },
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 33, "last_batch_iteration": 60},
    {"cycle_min_lr": [0.001, 0.01], "cycle_max_lr": [0.1, 0.2], "cycle_first_step_size": 40, "decay_lr_rate": 0.01},
    {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 7, "cycle_second_step_size": 3},
    {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 40,
        "decay_mom_rate": 0.2,
        "decay_step_size": 3,
    },
]
RANGE = [
    {},
    {"lr_range_test_step_size": 50},
    {"lr_range_test_min_lr": 0.0001, "lr_range_test_step_size": 20, "lr_range_test_step_rate": 3.0},
    {
        "lr_range_test_min_lr": 0.0001,
        "lr_range_test_step_size": 20,
        "lr_range_test_step_rate": 3.0,
        "lr_range_test_staircase": True,
    },
    {"lr_range_test_min_lr": [0.001, 0.1], "lr_range_test_step_size": 30, "lr_range_test_staircase": True},
    {"lr_range_test_step_size": 50, "last_batch_iteration": 99},
]
CASES = {"WarmupLR": WARMUP, "WarmupDecayLR": DECAY, "WarmupCosineLR": COSINE, "OneCycle": CYCLE, "LRRangeTest": RANGE}


def build_optimizer(kind, num_groups):
    groups = [{"params": [torch.zeros(1)], "lr": 0.05 * (i + 1)} for i in range(num_groups)]
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.5)
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def rounded(value):
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


def readings(optimizer):
    """Return [lr, momentum or first beta] of every group."""
    found = []
    for group in optimizer.param_groups:
        lr = group["lr"]
        lr = lr.item() if isinstance(lr, torch.Tensor) else float(lr)
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        found.append([lr, float(momentum)])
    return rounded(found)


def trace(name, params, num_groups, kind):
    from deepspeed.runtime import lr_schedules  # the tests that read this file have no DeepSpeed

    optimizer = build_optimizer(kind, num_groups)
    schedule = getattr(lr_schedules, name)(optimizer, **params)
    seen = {"built": readings(optimizer), "built_state": rounded(list(schedule.state_dict().items())), "steps": []}
    for index in range(STEPS[-1] + 1):
        schedule.step()
        if index in STEPS:
            seen["steps"].append(readings(optimizer))
    seen["last_lr"] = rounded([float(lr) for lr in schedule.get_last_lr()])
    schedule.step(3)
    seen["rewound"] = readings(optimizer)
    seen["state"] = rounded(list(schedule.state_dict().items()))
    return seen


def main():
    recorded = []
    for name, cases in CASES.items():
        for params in cases:
            num_groups = 2 if any(isinstance(value, list) for value in params.values()) else 1
            for kind in ("adam", "sgd") if "decay_mom_rate" in params else ("adam",):
                seen = trace(name, params, num_groups, kind)
                recorded.append({"name": name, "params": params, "optimizer": kind, "num_groups": num_groups, **seen})
    lines = ",\n".join(json.dumps(case) for case in recorded)
    Path(__file__).with_name("original_schedules.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
