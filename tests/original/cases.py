"""What the original is run on to make checkpoints: a model of 324 parameters, batches, a config for each kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANKS, SAVED_AT, STEPS_AFTER = 2, 5, 3
VOCAB, HIDDEN = 11, 6


class Model(nn.Module):
    """A token model with what makes files hard to read: tied, frozen and odd-sized weights, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.up, self.frozen, self.down = nn.Linear(HIDDEN, 10), nn.Linear(10, 10), nn.Linear(10, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("num_forwards", torch.zeros(()))
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of predicting each token of `tokens` [batch, length] from the one before it."""
        self.num_forwards += 1
        x = self.embed(tokens[:, :-1])  # [batch, length - 1, hidden]
        x = self.norm(x + self.down(self.frozen(self.up(x).tanh()).tanh()))
        return F.cross_entropy(self.head(x).float().flatten(0, 1), tokens[:, 1:].flatten())


@dataclass(frozen=True)
class Case:
    """One kind of checkpoint: a config for the original, and how the optimizer groups its parameters."""

    stage: int
    precision: str
    config: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    num_groups: int = 2
    decay: float = 0.1
    accumulation: int = 1
    is_universal: bool = False
    has_own_scheduler: bool = False
    kind: str = "AdamW"  # of optimizer
    optimizer: dict[str, Any] = field(default_factory=lambda: {"betas": [0.9, 0.98]})
    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    release: str = "0.19.6"  # of the original


TORCH_ADAM = {"betas": [0.9, 0.98], "torch_adam": True}
MOMENTUM: dict[str, Any] = {"kind": "SGD", "optimizer": {"momentum": 0.9}, "states": ("momentum_buffer",)}
OFFLOADED, UNSCATTERED = {"offload_optimizer": {"device": "cpu"}}, {"reduce_scatter": False}
LION: dict[str, Any] = {"kind": "Lion", "states": ("exp_avg",)}
LAMB: dict[str, Any] = {"kind": "Lamb", "optimizer": {"betas": [0.9, 0.98], "max_coeff": 5.0}}
MUON: dict[str, Any] = {"kind": "Muon", "optimizer": {"ns_method": "standard"}, "num_groups": 1}
MUON["states"] = ("momentum_buffer", "exp_avg", "exp_avg_sq")
CASES = {
    "fp32-stage0": Case(0, "fp32", num_groups=1),
    "bf16-stage0": Case(0, "bf16"),
    "fp16-stage0": Case(0, "fp16"),
    "fp16-stage0-static": Case(0, "fp16", {"fp16": {"enabled": True, "loss_scale": 1}}),
    "fp32-stage1": Case(1, "fp32", has_own_scheduler=True),
    "bf16-stage1": Case(1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}}),
    "fp16-stage1": Case(1, "fp16", accumulation=2),
    "fp32-stage2": Case(2, "fp32", zero={"round_robin_gradients": True, "offload_optimizer": {"device": "cpu"}}),
    "bf16-stage2": Case(2, "bf16", optimizer=TORCH_ADAM),
    "fp16-stage2": Case(2, "fp16", {"fp16": {"enabled": True, "loss_scale": 128}}, accumulation=2),
    "elastic": Case(2, "bf16", zero={"elastic_checkpoint": True}),
    "fp32-stage3": Case(3, "fp32", zero={"sub_group_size": 50, "stage3_param_persistence_threshold": 20}),
    "bf16-stage3": Case(3, "bf16"),
    "fp16-stage3": Case(3, "fp16", optimizer=TORCH_ADAM),
    "universal-stage1": Case(1, "bf16", is_universal=True),
    "universal-stage3": Case(3, "fp32", is_universal=True),
    "sgd-bf16-stage0": Case(0, "bf16", **MOMENTUM),
    "sgd-fp16-stage2": Case(2, "fp16", **MOMENTUM),
    "adam-fp32-stage1": Case(1, "fp32", kind="Adam", optimizer={"betas": [0.9, 0.98], "adam_w_mode": False}),
    "0.16.9-fp32-stage3": Case(3, "fp32", optimizer=TORCH_ADAM, release="0.16.9"),
    "0.14.5-bf16-stage2": Case(2, "bf16", optimizer=TORCH_ADAM, release="0.14.5"),
    "adagrad-fp32-stage0": Case(0, "fp32", kind="Adagrad", optimizer={}, states=("sum",)),
    # its kernel leaves the decay out of the step, and takes it into the sum
    "cpu-adagrad-fp32-stage2": Case(
        2, "fp32", zero=OFFLOADED, kind="Adagrad", optimizer={}, states=("sum",), decay=0.0
    ),
    "cpu-lion-fp32-stage2": Case(2, "fp32", zero=OFFLOADED, **LION),
    "lion-fp32-stage1": Case(1, "fp32", **LION),
    "lamb-fp32-stage0": Case(0, "fp32", **LAMB),
    "lamb-fp16-stage0": Case(0, "fp16", {"fp16": {"enabled": True, "initial_scale_power": 0}}, **LAMB),
    # it clips Muon's updates in place of the gradients; at stage 3 it fails on matrices of several shapes
    "muon-bf16-stage2": Case(2, "bf16", {"gradient_clipping": 0.0}, zero=UNSCATTERED, **MUON),
}


def config_of(case: Case, stage: int, num_ranks: int) -> dict[str, Any]:
    """Return the config that trains `case` on 4 samples a micro-batch in all, for the original or for us."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 7}}
    return {
        "train_micro_batch_size_per_gpu": 4 // num_ranks,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": case.kind, "params": {"lr": 1e-2, **case.optimizer}},
        "zero_allow_untested_optimizer": True,
        **({} if case.has_own_scheduler else {"scheduler": schedule}),
        "zero_optimization": {"stage": stage, **(case.zero if stage == case.stage else {})},
        "bf16": {"enabled": case.precision == "bf16"},
        "fp16": {
            "enabled": case.precision == "fp16",
            "initial_scale_power": 18,
            "loss_scale_window": 3,
            "hysteresis": 1,
        },
        **case.config,
    }


def scheduler_of(case: Case) -> Any:
    """Return the function that makes the case's own learning-rate schedule from an optimizer; None without one."""
    return (lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)) if case.has_own_scheduler else None


def groups_of(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """Return the optimizer groups: all in one, or biases and norms without weight decay in another."""
    trained = [param for param in model.parameters() if param.requires_grad]
    if case.num_groups == 1:
        return [{"params": trained, "weight_decay": case.decay}]
    return [
        {"params": [param for param in trained if param.dim() > 1], "weight_decay": case.decay},
        {"params": [param for param in trained if param.dim() <= 1], "weight_decay": 0.0},
    ]


def batch(step: int, micro: int, rank: int, num_ranks: int) -> Tensor:
    """Return `rank`'s tokens [4 / num_ranks, 6] of a micro-batch; all ranks' together are the same for any number."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    tokens = torch.randint(0, VOCAB, (4, 6), generator=generator)
    return tokens.chunk(num_ranks)[rank]


def train(engine: Any, case: Case, steps: range, rank: int, num_ranks: int) -> list[float]:
    """Train for `steps` and return this rank's mean loss of each."""
    losses = []
    for step in steps:
        total = 0.0
        for micro in range(case.accumulation):
            loss = engine(batch(step, micro, rank, num_ranks))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        losses.append(total / case.accumulation)
    return losses
