"""What offload costs and gives: step time, peaks, where the bytes rest, and how well disk and bus are used.

    python benchmarks/offload.py none cpu cpu/cpu nvme nvme/nvme --dtype bf16 --rounds 3 --folder /local_nvme
    python benchmarks/offload.py none cpu nvme --cuda --ranks 1 --hidden 2048 --layers 24 --micro-batch 8

A case is OPTIMIZER[/PARAM]: the devices that optimizer states and parameters are offloaded to. Rounds interleave; the
first case is the unit of `x first`. Where host and device are one memory (no --cuda), `cpu` changes nothing and one
peak stands for both. Beside what training reached stand plain loops, run by all ranks at once right after the steps:

    disk     GB read and written a step; the share of the step in which the disk was busy; and the time that the plain
             loop (one direct call of 16 MiB after another) would take for these bytes, over the time it was busy
    copies   GB a step down to the host and up, by the profiler; their bandwidth over that of plain pinned copies
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_step
from benchmarks.ranks import is_rank, run_on_ranks

PLAIN_FILE_BYTES = 512 << 20


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["none", "cpu", "cpu/cpu", "nvme", "nvme/nvme"])
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cuda", action="store_true", help="train on CUDA, one rank a device")
    parser.add_argument("--threads", type=int, default=1, help="of each rank, for the update on the host")
    parser.add_argument("--json", action="store_true")
    return parser.parse_known_args(arguments)


def measure(case: str, options: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """Run one case's steps on this rank and return its numbers."""
    import torch

    import craken
    from benchmarks import gpt
    from craken import comm

    torch.set_num_threads(options.threads)
    steps = train_step.parse([f"craken:{options.stage}", *extra])
    size = gpt.Size(steps.hidden, steps.layers, steps.vocab, steps.length)
    rank, seen = int(os.environ["RANK"]), 0
    accelerator = comm.get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    comm.init_distributed(dist_backend=accelerator.communication_backend_name())
    model = gpt.build(size)
    config = train_step.config_of(f"{options.stage}:{case}", steps)
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)

    def batch() -> Any:
        nonlocal seen
        seen += 1
        return gpt.tokens(size, steps.micro_batch, seen, rank).to(engine.device)

    step = train_step.step_of(engine, batch, steps.accumulation)
    result = timed(step, engine, steps)
    if options.cuda:
        from benchmarks.copies import plain_copies, profiled_copies

        result |= {"copies": profiled_copies(step), "plain_copies": plain_copies()}
    if result["traffic"]["busy_s"]:
        result["plain_disk"] = plain_disk(Path(steps.folder))
    engine.destroy()
    comm.shutdown()
    return result


def timed(step: Callable[[], float], engine: Any, steps: argparse.Namespace) -> dict[str, Any]:
    """Take the steps and return times, peaks since the warm-up, the ledger, and what the disk moved meanwhile."""
    import torch.distributed as dist

    from craken.comm import get_accelerator

    accelerator, walls, cpus, losses = get_accelerator(), [], [], []
    before, begin_s = {}, 0.0
    for number in range(steps.warmup + steps.steps):
        if number == steps.warmup:
            accelerator.reset_peak_memory_stats()
            Path("/proc/self/clear_refs").write_text("5")
            before, begin_s = traffic_of(engine), time.perf_counter()
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        losses.append(step())
        accelerator.synchronize()
        cpus.append(time.process_time() - cpu)
        dist.barrier()
        walls.append(time.perf_counter() - wall)
    elapsed_s = time.perf_counter() - begin_s
    moved = {key: value - before[key] for key, value in traffic_of(engine).items()}
    return {
        "step_ms": 1000 * statistics.median(walls[steps.warmup :]),
        "cpu_ms": 1000 * statistics.median(cpus[steps.warmup :]),
        "device_mb": accelerator.max_memory_allocated() / 2**20,
        "host_mb": train_step.peak_mb(),
        "ledger": engine.memory_ledger(),
        "traffic": moved,
        "busy": moved["busy_s"] / elapsed_s,
        "num_steps": steps.steps,
        "losses": losses,
    }


def traffic_of(engine: Any) -> dict[str, float]:
    """Return the sum of all disks' counts."""
    counts = engine.swap_statistics()
    return {key: sum(getattr(count, key) for count in counts) for key in ("read_bytes", "written_bytes", "busy_s")}


def plain_disk(folder: Path) -> dict[str, float]:
    """Return bytes per second of the plain loop on this rank while all ranks run it."""
    import torch.distributed as dist

    from craken.disk import IoSettings
    from craken.disk.measure import measure as measure_disk

    dist.barrier()
    found = measure_disk(folder, PLAIN_FILE_BYTES, [IoSettings()], ["write", "read"]).plain.bytes_per_s
    dist.barrier()
    return {"write": found["write"], "read": found["read"]}


def summary(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Put the ranks of one run together: the slowest one's time, the largest one's memory, the sum of what moved."""
    num_steps = ranks[0]["num_steps"]
    row = {key: max(rank[key] for rank in ranks) for key in ("step_ms", "cpu_ms", "device_mb", "host_mb", "busy")}
    row |= {f"{place}_ledger_mb": max(rank["ledger"].get(place, 0) for rank in ranks) / 2**20 for place in PLACES}
    for name in ("read", "written"):
        row[f"{name}_gb"] = sum(rank["traffic"][f"{name}_bytes"] for rank in ranks) / num_steps / 1e9
    if "plain_disk" in ranks[0]:
        row["of_plain_disk"] = statistics.mean(of_plain_disk(rank) for rank in ranks)
    for way in ("down", "up") if "copies" in ranks[0] else ():
        row[f"{way}_gb"] = sum(rank["copies"][way]["mb"] for rank in ranks) / 1e3
        row[f"of_plain_{way}"] = statistics.mean(
            rank["copies"][way]["gb_per_s"] / rank["plain_copies"][way] for rank in ranks
        )
    return row | {"loss": statistics.mean(rank["losses"][-1] for rank in ranks)}


def of_plain_disk(rank: dict[str, Any]) -> float:
    """Return the time that the plain loop takes for what this rank moved, over the time that its disk was busy."""
    moved, plain = rank["traffic"], rank["plain_disk"]
    return (moved["read_bytes"] / plain["read"] + moved["written_bytes"] / plain["write"]) / moved["busy_s"]


PLACES = ("device", "host", "nvme")
COLUMNS = {
    "step_ms": ("step ms", ".0f"),
    "x_first": ("x first", ".2f"),
    "cpu_ms": ("cpu ms", ".0f"),
    "device_mb": ("device MB", ".0f"),
    "host_mb": ("host MB", ".0f"),
    **{f"{place}_ledger_mb": (f"in {place}", ".0f") for place in PLACES},
    "read_gb": ("read GB", ".2f"),
    "written_gb": ("write GB", ".2f"),
    "busy": ("busy", ".2f"),
    "of_plain_disk": ("x plain", ".2f"),
    "down_gb": ("down GB", ".2f"),
    "of_plain_down": ("x plain", ".2f"),
    "up_gb": ("up GB", ".2f"),
    "of_plain_up": ("x plain", ".2f"),
    "loss": ("loss", ".5f"),
}


def table(rows: dict[str, dict[str, float]]) -> str:
    shown = [key for key in COLUMNS if any(row.get(key) for row in rows.values())]
    lines = [f"{'case':10}" + "".join(f"{COLUMNS[key][0]:>11}" for key in shown)]
    for case, row in rows.items():
        numbers = [format(row[key], COLUMNS[key][1]) if key in row else "-" for key in shown]
        lines.append(f"{case:10}" + "".join(f"{number:>11}" for number in numbers))
    return "\n".join(lines)


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def run_rounds(options: argparse.Namespace, extra: list[str]) -> dict[str, dict[str, float]]:
    """Run every case in turn, round after round; a case that fails is said and left out."""
    num_ranks = train_step.parse(["craken:0", *extra]).ranks
    variables = {"OMP_NUM_THREADS": options.threads, "MKL_NUM_THREADS": options.threads}
    variables |= train_step.variables_of(options)
    runs: dict[str, list[dict[str, float]]] = {}
    flags = [f"--stage={options.stage}", f"--threads={options.threads}", *(["--cuda"] if options.cuda else []), *extra]
    for _ in range(options.rounds):
        for case in options.cases:
            command = [sys.executable, __file__, case, *flags]
            try:
                row = summary(run_on_ranks(command, num_ranks, variables=variables))
            except RuntimeError as error:
                print(f"{case} failed: {error}", file=sys.stderr, flush=True)
                continue
            runs.setdefault(case, []).append(row)
            print(f"{case} {row['step_ms']:.0f} ms", file=sys.stderr, flush=True)
    return {case: medians(results) for case, results in runs.items()}


def main() -> None:
    options, extra = parse()
    if is_rank():
        print(json.dumps(measure(options.cases[0], options, extra)), flush=True)
        return
    rows = run_rounds(options, extra)
    if not rows:
        sys.exit("no case ran")
    first = next(iter(rows.values()))["step_ms"]
    rows = {case: row | {"x_first": row["step_ms"] / first} for case, row in rows.items()}
    print(table(rows))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
