"""Records steps of DeepSpeed's own Adam on the CPU, as `original_optimizers.json` beside this file.

Its Lion, LAMB and Adagrad have no CPU kernels, so they are not here. Run by hand, in an environment that has
DeepSpeed 0.19.6 and a C++ compiler:

    DS_ACCELERATOR=cpu python tests/unit/optim/record_original_optimizers.py
"""

import json
from pathlib import Path

import torch

STEPS = 12
SIZE = 24
CASES = [
    ("FusedAdam", {}),
    ("FusedAdam", {"lr": 0.02, "weight_decay": 0.3}),
    ("FusedAdam", {"lr": 0.02, "weight_decay": 0.3, "adam_w_mode": False}),
    ("FusedAdam", {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-4, "bias_correction": False}),
    ("DeepSpeedCPUAdam", {}),
    ("DeepSpeedCPUAdam", {"lr": 0.02, "weight_decay": 0.3}),
    ("DeepSpeedCPUAdam", {"lr": 0.02, "weight_decay": 0.3, "adamw_mode": False}),
    ("DeepSpeedCPUAdam", {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-4, "bias_correction": False}),
]


def start():
    return torch.linspace(-1, 1, SIZE)


def gradient(step):
    return torch.sin(torch.arange(SIZE) * 1.7 + step) * (1 + step % 3)


def run(optimizer, param):
    """Step `optimizer`; return the parameter after each step."""
    seen = []
    for step in range(STEPS):
        param.grad = gradient(step)
        optimizer.step()
        seen.append([float(f"{value:.9g}") for value in param.detach().tolist()])
    return seen


def main():
    from deepspeed.ops import adam  # the tests that read this file have no DeepSpeed

    lines = []
    for name, params in CASES:
        param = torch.nn.Parameter(start())
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
        seen = run(getattr(adam, name)([param], **options), param)
        lines.append(json.dumps({"name": name, "params": params, "first": seen[0], "last": seen[-1]}))
    Path(__file__).with_name("original_optimizers.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
