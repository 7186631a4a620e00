"""One training step of a GPT on N ranks under one implementation: step time, CPU time, peak memory, losses.

    python benchmarks/train_step.py craken:2 --dtype bf16 --ranks 2 --accumulation 1
    python benchmarks/train_step.py craken:2 --dtype bf16 --ranks 1 --cuda --hidden 2048 --layers 24 --micro-batch 8

IMPLEMENTATION is `craken:STAGE`, `original:STAGE` (whatever `deepspeed` this Python imports), `ddp`, `ddp:autocast`
(fp32 weights, computed with in bf16), `fsdp2:2` (weights kept after forward), `fsdp2:3` (freed), or `alone` (no
communication: every rank trains by itself). `craken:3:cpu/nvme` and the like offload: optimizer states to the first,
parameters to the second, files to `--folder`. Ranks are CPU processes on gloo; with `--cuda` each has a device of its
own and NCCL, the peak is the device's, of building the model too, and CPU time includes waiting for the device. Prints
one line of JSON: times of the slowest rank, memory of the largest one. compare.py runs several in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ranks import is_rank, run_on_ranks

LEARNING_RATE, DECAY = 3e-4, 0.01
PEERS = ("ddp", "ddp:autocast", "fsdp2:2", "fsdp2:3", "alone")
Step = Callable[[], float]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("implementation")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--cuda", action="store_true", help="train on CUDA, one rank a device")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for files of offload to nvme")
    for name, value in (("hidden", 512), ("layers", 8), ("vocab", 8192), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the steps on this rank and return its numbers."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    step = prepare(options)
    walls, cpus, losses = [], [], []
    for _ in range(options.warmup + options.steps):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        if options.cuda:
            torch.cuda.synchronize()
        cpus.append(time.process_time() - cpu)
        dist.barrier()
        walls.append(time.perf_counter() - wall)
    result = {
        "step_ms": 1000 * statistics.median(walls[options.warmup :]),
        "min_ms": 1000 * min(walls[options.warmup :]),
        "cpu_ms": 1000 * statistics.median(cpus[options.warmup :]),
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if options.cuda else peak_mb(),
        "losses": losses,
    }
    dist.barrier()
    dist.destroy_process_group()
    return result


def prepare(options: argparse.Namespace) -> Step:
    """Bring the ranks up and return what takes one whole step and returns its mean loss on this rank."""
    import torch
    import torch.distributed as dist

    from benchmarks import gpt

    name, _, sharding = options.implementation.partition(":")
    size = gpt.Size(options.hidden, options.layers, options.vocab, options.length)
    rank, seen = int(os.environ["RANK"]), 0
    if options.cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    def batch() -> Any:
        nonlocal seen
        seen += 1
        return gpt.tokens(size, options.micro_batch, seen, rank).to(device_of(options))

    if name in ("craken", "original"):
        return _deepspeed_like(name, sharding, built(size, options), batch, options)
    if options.implementation not in PEERS:
        raise ValueError(f"unknown implementation {options.implementation!r}; see --help")
    dist.init_process_group(backend_of(options))
    return _plain_torch(options.implementation, built(size, options), batch, options)


def built(size: Any, options: argparse.Namespace) -> Any:
    """Return the model where it is trained: a single thread of the host would take minutes for a large one."""
    import torch

    from benchmarks import gpt

    with torch.device(device_of(options)):
        return gpt.build(size)


def device_of(options: argparse.Namespace) -> str:
    return "cuda" if options.cuda else "cpu"


def backend_of(options: argparse.Namespace) -> str:
    return "nccl" if options.cuda else "gloo"


def config_of(sharding: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the JSON config for `STAGE` or `STAGE:OPTIMIZER[/PARAM]`, the latter two devices to offload to."""
    stage, _, offload = sharding.partition(":")
    zero: dict[str, Any] = {"stage": int(stage)}
    for key, device in zip(("offload_optimizer", "offload_param"), filter(None, offload.split("/")), strict=False):
        zero[key] = {"device": device, "nvme_path": options.folder, "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE, "weight_decay": DECAY}},
        "gradient_clipping": options.clip,
        "zero_optimization": zero,
        "bf16": {"enabled": options.dtype == "bf16"},
    }


def _deepspeed_like(
    name: str, sharding: str, model: Any, batch: Callable[[], Any], options: argparse.Namespace
) -> Step:
    if name == "craken":
        import craken as library
    else:
        import deepspeed as library
    library.init_distributed(dist_backend=backend_of(options))
    engine, *_ = library.initialize(
        model=model, model_parameters=model.parameters(), config=config_of(sharding, options)
    )
    return step_of(engine, batch, options.accumulation)


def step_of(engine: Any, batch: Callable[[], Any], accumulation: int) -> Step:
    """Return what takes one whole step of an engine and returns its mean loss on this rank."""

    def step() -> float:
        total = 0.0
        for _ in range(accumulation):
            loss = engine(batch())
            engine.backward(loss)
            engine.step()
            total += loss.item()
        return total / accumulation

    return step


def _plain_torch(implementation: str, model: Any, batch: Callable[[], Any], options: argparse.Namespace) -> Step:
    import torch
    from torch import nn

    name, _, kind = implementation.partition(":")
    autocast = torch.autocast(device_of(options), torch.bfloat16, enabled=kind == "autocast")
    if name == "fsdp2":
        net, set_sync = _fully_sharded(model, options, keeps_weights=kind == "2")
    else:
        # no fp32 master in bf16: flatters these two, in time and in memory
        model = model.bfloat16() if options.dtype == "bf16" and kind != "autocast" else model
        net = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if name == "ddp" else model

        def set_sync(is_last: bool) -> None:
            net.require_backward_grad_sync = is_last

    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True)

    def step() -> float:
        total = 0.0
        for micro in range(options.accumulation):
            set_sync(micro == options.accumulation - 1)
            with autocast:
                loss = net(batch())
            (loss / options.accumulation).backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(net.parameters(), options.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total / options.accumulation

    return step


def _fully_sharded(
    model: Any, options: argparse.Namespace, *, keeps_weights: bool
) -> tuple[Any, Callable[[bool], None]]:
    """Shard as ZeRO does: gradients leave the rank in every backward."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device_of(options), (options.ranks,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if options.dtype == "bf16" else None)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not keeps_weights)
    return model, lambda is_last: None


def peak_mb() -> float:
    """Return the most resident memory this process ever had, in units of 2**20 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def variables_of(options: argparse.Namespace) -> dict[str, object]:
    """Return what the ranks' environment says besides a launcher's variables."""
    return {"DS_ACCELERATOR": "cuda"} if options.cuda else {}


def over_ranks(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank's times, the largest rank's memory, the mean of the losses."""
    worst = {key: round(max(rank[key] for rank in results), 1) for key in ("step_ms", "min_ms", "cpu_ms", "peak_mb")}
    return {
        **worst,
        "losses": [round(statistics.mean(step), 5) for step in zip(*(r["losses"] for r in results), strict=True)],
    }


def main() -> None:
    options = parse()
    if is_rank():
        print(json.dumps(measure(options)), flush=True)
    else:
        found = run_on_ranks([sys.executable, *sys.argv], options.ranks, variables=variables_of(options))
        print(json.dumps({"case": options.implementation, **over_ranks(found)}))


if __name__ == "__main__":
    main()
