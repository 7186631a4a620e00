"""The engine's own time per step: how it grows with tensors, shard groups, parameters and ranks.

    python benchmarks/overhead.py [--stages 0 1 2] [--ranks 1 2 4] [--dtype fp32]

Overhead is the step through the engine less the same step written by hand: forward, backward, clipping at the same norm
(`clip_grad_norm_`) and fused AdamW on the same tensors, and the same messages (sizes, order, number in flight) sent by
plain calls of the backend. Tensors are tiny in the first two tables, so neither compute nor bytes hide it:

    tensors      10 to 5,000 tensors, as few shard groups as they need       -> us a tensor (slope)
    groups       1,000 tensors in more and more shard groups                 -> us a group (slope)
    parameters   100 tensors of growing size: what is left here is bytes, norms and masters, in ns a parameter

Both are taken in turn, a few steps each, so that a busy minute of the machine falls on both. The budget is 25 us a
tensor plus 200 us a group a step, in CPU time of the thread that trains: neither the backend's threads nor what else
the machine does count, but for what that does to the caches. Clock times stand beside it. Exits 1 when a row is over
the budget on any rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ranks import is_rank, run_on_ranks

US_A_TENSOR, US_A_GROUP = 25.0, 200.0
TENSORS = (10, 100, 1000, 5000)
GROUPED_TENSORS, BUCKETS = 1000, (8000, 1000, 250, 80)  # of 8 elements each; bucket sizes in elements
SIZED_TENSORS, SIZES = 100, (1_000, 10_000, 100_000)
MAX_NORM = 1.0
WARMUP, STEPS_A_ROUND = 3, 5
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
TENSORS_A_RUN = 6000  # tiny points get more rounds, until so many tensors were stepped


class Point(NamedTuple):
    """One measurement: so many tensors of so many elements, in buckets of at most so many elements."""

    num_tensors: int
    numel: int
    bucket: int

    @property
    def num_parameters(self) -> int:
        return self.num_tensors * self.numel


POINTS = {
    "tensors": [Point(num_tensors, 8, 10**9) for num_tensors in TENSORS],
    "groups": [Point(GROUPED_TENSORS, 8, bucket) for bucket in BUCKETS],
    "parameters": [Point(SIZED_TENSORS, numel, 10**9) for numel in SIZES],
}


def build(point: Point, dtype: Any) -> Any:
    """Return a module of separate parameters whose forward costs one concatenation."""
    import torch
    from torch import nn

    class Heap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.ParameterList(
                nn.Parameter(torch.ones(point.numel, dtype=dtype)) for _ in range(point.num_tensors)
            )

        def forward(self) -> torch.Tensor:
            return torch.cat(list(self.all)).float().mean()

    return Heap()


class Cost(NamedTuple):
    wall_us: float
    cpu_us: float


def timed(step: Callable[[], None]) -> Cost:
    """Return the cost of a step that all ranks begin together."""
    import torch.distributed as dist

    dist.barrier()
    wall, cpu = time.perf_counter(), time.thread_time()
    step()
    return Cost(1e6 * (time.perf_counter() - wall), 1e6 * (time.thread_time() - cpu))


def medians(costs: Iterable[Cost]) -> Cost:
    walls, cpus = zip(*costs, strict=True)
    return Cost(statistics.median(walls), statistics.median(cpus))


def in_turn(steps: Sequence[Callable[[], None]], num_rounds: int) -> list[Cost]:
    """Return the median cost of each step, taken a few at a time in turn."""
    costs: list[list[Cost]] = [[] for _ in steps]
    for step in steps:
        for _ in range(WARMUP):
            timed(step)
    for _ in range(num_rounds):
        for step, found in zip(steps, costs, strict=True):
            found += [timed(step) for _ in range(STEPS_A_ROUND)]
    return [medians(found) for found in costs]


class Messages:
    """The messages of a step, as an event log has them, sent by plain calls of the backend."""

    def __init__(self, events: list[Any]) -> None:
        import torch.distributed as dist

        self._group: Any = dist.group.WORLD
        self._peers = [rank for rank in range(self._group.size()) if rank != self._group.rank()]
        self._tag = 0
        summed = next((at for at, event in enumerate(events) if event.op == "all_reduce"), len(events))
        self._before = [(event.op, self._memory(event)) for event in events[:summed]]
        self._vote, self._after = (
            [self._memory(event) for event in part] for part in (events[summed : summed + 1], events[summed + 1 :])
        )

    def _memory(self, event: Any) -> Any:
        """Return [2, peers, elements a message]: what comes in and what goes out."""
        import torch

        return torch.empty(2, len(self._peers), event.sent_numel // len(self._peers), dtype=event.dtype)

    def before_update(self) -> None:
        """Send what carries gradients, two sums in flight, gathers of sums as these are done; then the vote."""
        in_flight: list[list[Any]] = []
        gathers: list[list[Any]] = []
        for op, memory in self._before:
            if in_flight and (op == "all_gather" or len(in_flight) == 2):
                self._wait(in_flight.pop(0))
            (gathers if op == "all_gather" else in_flight).append(self._start(memory))
        for works in (*in_flight, *gathers):
            self._wait(works)
        for memory in self._vote:
            self._wait(self._start(memory))

    def after_update(self) -> None:
        """Send what carries parameters, all at once."""
        for works in [self._start(memory) for memory in self._after]:
            self._wait(works)

    def _start(self, memory: Any) -> list[Any]:
        self._tag += 1
        inbox, outbox = memory
        works = [self._group.recv([tensor], peer, self._tag) for tensor, peer in zip(inbox, self._peers, strict=True)]
        works += [self._group.send([tensor], peer, self._tag) for tensor, peer in zip(outbox, self._peers, strict=True)]
        return works

    def _wait(self, works: list[Any]) -> None:
        for work in works:
            work.wait()


def by_hand(point: Point, dtype: Any, events: list[Any]) -> Callable[[], None]:
    """Return the step without the engine; `events` are the messages it sends."""
    import torch

    model = build(point, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    messages = Messages(events)

    def step() -> None:
        model().backward()
        messages.before_update()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        messages.after_update()
        optimizer.zero_grad()

    return step


def engine_for(point: Point, dtype: Any, stage: int) -> Any:
    import torch

    import craken

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": MAX_NORM,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": point.bucket,
            "allgather_bucket_size": point.bucket,
        },
        "bf16": {"enabled": dtype is torch.bfloat16},
    }
    model = build(point, torch.float32)
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def measure_point(point: Point, dtype: Any, stage: int) -> list[float]:
    """Return one rank's row: tensors, parameters, groups, by hand wall and CPU, engine wall and CPU."""
    from craken.comm import event_log

    engine = engine_for(point, dtype, stage)

    def step() -> None:
        engine.backward(engine())
        engine.step()

    for _ in range(WARMUP):  # the first step settles the order of groups
        step()
    with event_log() as events:
        step()
    num_rounds = min(max(TENSORS_A_RUN // (point.num_tensors * STEPS_A_ROUND), FEWEST_ROUNDS), MOST_ROUNDS)
    hand, own = in_turn([by_hand(point, dtype, events), step], num_rounds)
    num_groups = len(engine.groups)
    engine.destroy()
    return [point.num_tensors, point.num_parameters, num_groups, *hand, *own]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one rank's share of every point: table -> rows."""
    import torch

    from craken import comm

    torch.set_num_threads(1)
    comm.init_distributed(dist_backend="gloo")
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    rows = {table: [measure_point(point, dtype, options.stage) for point in points] for table, points in POINTS.items()}
    comm.shutdown()
    return rows


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the least-squares slope."""
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread if spread else 0.0


def report(rows: dict[str, list[list[float]]], title: str) -> bool:
    """Print the tables; return whether all of the tiny-tensor rows are within the budget."""
    heads = f"{'by hand us':>11}{'engine us':>10}{'over us':>9}{'budget us':>10}{'clock over us':>14}"
    print(f"\n{title}\n{'table':11}{'tensors':>8}{'parameters':>12}{'groups':>7}{heads}")
    within, overs = True, {}
    for table, points in rows.items():
        overs[table] = []
        for tensors, parameters, groups, hand_wall, hand, wall, engine in points:
            budget, over = US_A_TENSOR * tensors + US_A_GROUP * groups, engine - hand
            is_bytes = table == "parameters"
            verdict = "" if is_bytes or over <= budget else "  OVER"
            within &= not verdict
            overs[table].append(over)
            numbers = f"{hand:11.0f}{engine:10.0f}{over:9.0f}{'-' if is_bytes else format(budget, '.0f'):>10}"
            print(
                f"{table:11}{tensors:8.0f}{parameters:12.0f}{groups:7.0f}{numbers}{wall - hand_wall:14.0f}{verdict}",
                flush=True,
            )
    per_tensor = slope([row[0] for row in rows["tensors"]], overs["tensors"])
    per_group = slope([row[2] for row in rows["groups"]], overs["groups"])
    per_parameter = slope([row[1] for row in rows["parameters"]], overs["parameters"])
    print(
        f"slopes: {per_tensor:.1f} us a tensor, {per_group:.0f} us a group, {1000 * per_parameter:.2f} ns a parameter"
    )
    return within


def _worst(rows: Iterable[list[float]]) -> list[float]:
    """Return the row of the rank on which the engine cost most."""
    return max(rows, key=lambda row: row[-1] - row[-3])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if is_rank():
        print(json.dumps(measure(options)), flush=True)
        return
    within = True
    for num_ranks in options.ranks:
        for stage in options.stages:
            command = [sys.executable, __file__, "--stage", str(stage), "--dtype", options.dtype]
            results = run_on_ranks(command, num_ranks)
            worst = {
                table: [_worst(rank[table][at] for rank in results) for at in range(len(points))]
                for table, points in results[0].items()
            }
            within &= report(worst, f"stage {stage}, {num_ranks} ranks, {options.dtype}")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
