"""One rank of a job whose model does not fit: build, train, save, all under a limit of memory. Run as a program.

    python -m tests.scale.larger_than_memory FORM FOLDER [--gather]      (RANK and WORLD_SIZE set, a store in FOLDER)

After the imports the process may take no more data memory than a share of what the whole weights would need. With
--gather the whole is brought together at the end, which must be impossible. What was seen goes to FOLDER/rank<N>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

WIDTH, NUM_BLOCKS = 512, 96  # blocks of 2.1 M parameters, 8.4 MB in fp32
WEIGHT_BYTES = 4 * NUM_BLOCKS * 8 * WIDTH * WIDTH
SHARE = 0.6  # of the whole weights' bytes
STEPS = 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Adapted(nn.Module):
    """A frozen linear layer with a trainable update of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class AdaptedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Adapted(self.up), Adapted(self.down)


class Tower(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class Form:
    """One way to train what fits nowhere: the ranks, the model's block, the rest of the config, what goes to files."""

    world_size: int
    block: Callable[[], nn.Module]
    config: dict[str, Any]
    offloads: tuple[str, ...] = ()


FORMS = {
    "SGD": Form(4, Block, {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}}),
    "Adam in files": Form(
        4,  # sums of gradients take 25 %; on 2 ranks half, and what does not grow with the model would be too much
        Block,
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-6}}},
        offloads=("offload_optimizer", "offload_param"),
    ),
    "LoRA": Form(2, AdaptedBlock, {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}}}),
}


def data_bytes() -> int:
    """Return the private writable memory that this process has mapped, which RLIMIT_DATA limits."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))


def run(form: Form, folder: Path, *, gathers: bool) -> dict[str, Any]:
    import craken
    from craken.engine import DeepSpeedEngine  # noqa: F401 - all imports come before the limit
    from craken.zero import GatheredParameters, Init

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        **form.config,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            **{
                name: {"device": "nvme", "nvme_path": str(folder / "swap"), "buffer_count": 2} for name in form.offloads
            },
        },
    }
    assert torch._dynamo, "torch's optimizers import it when the first is made; all imports come before the limit"
    baseline = data_bytes()
    limit = baseline + int(SHARE * WEIGHT_BYTES)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    seen: dict[str, Any] = {"weights": WEIGHT_BYTES, "baseline": baseline}

    def note(phase: str) -> None:
        seen[phase] = round((data_bytes() - baseline) / WEIGHT_BYTES, 3)

    torch.manual_seed(1)
    with Init(config_dict_or_path=config):
        model = Tower(form.block)
    note("built")
    engine, *_ = craken.initialize(model=model, config=config)
    note("initialized")
    x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    seen["losses"] = []
    for _ in range(STEPS):
        loss = (engine(x) - 1).square().mean()
        engine.backward(loss)
        engine.step()
        seen["losses"].append(loss.item())
    note("trained")
    engine.save_checkpoint(folder / "checkpoint")
    note("saved")
    seen["ledger"] = engine.memory_ledger()
    if gathers:
        try:
            with GatheredParameters(model.parameters()):
                seen["whole"] = sum(param.numel() for param in model.parameters())
        except (MemoryError, RuntimeError) as error:
            seen["refused"] = f"{type(error).__name__}: {error}"
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("form", choices=sorted(FORMS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gather", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rank, form = int(os.environ["RANK"]), FORMS[arguments.form]
    store = dist.FileStore(str(arguments.folder / "store"), form.world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=form.world_size)
    seen = run(form, arguments.folder, gathers=arguments.gather)
    (arguments.folder / f"rank{rank}.json").write_text(json.dumps(seen))
    os._exit(0)  # a rank that was refused memory leaves its peers in the middle of a gather


if __name__ == "__main__":
    main()
