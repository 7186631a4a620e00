"""Save and load bandwidth of checkpoints, beside torch's own ways and plain loops, on the same disk.

    python benchmarks/checkpoint.py --ranks 1 --folder /local_disk
    python benchmarks/checkpoint.py --ranks 2 --rounds 5 --gb-per-rank 1
    python benchmarks/checkpoint.py --ranks 2 --stall

Every rank brings its own gigabyte: weights and two moments, in host memory, random numbers. All ranks work at once,
each way in turn, round after round; a time is the slowest rank's, from barrier to barrier.

    loop      one write call of 8 MiB after another, then fsync (`dd bs=8M conv=fsync`); reads likewise
    direct    the same past the page cache (`dd oflag=direct`)
    craken    `save` with all checksums and the index; `Reader.read_all` into tensors that are there, all blocks checked
    torch     `torch.save` of a dict on each rank; `torch.load`
    dcp       `torch.distributed.checkpoint`, its files synced; loaded into tensors that are there

Saving ends when all files and their folder are fsynced, whichever way it is. Before loading, files are dropped from the
page cache (posix_fadvise, DONTNEED). `x disk` is the median over rounds of the rate over that of the faster plain loop
in the same round. Extra MB is how far memory rose meanwhile over what the process held before or holds after.

`--stall` measures instead for how long training stands still at a save in the background (`async_save`), with a step
between two saves, beside a plain copy of as many bytes: into memory that is kept, and for the first save, which has to
get its memory, into new memory.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ranks import is_rank, run_on_ranks

CALL_BYTES = 8 << 20
TENSOR_BYTES = 16 << 20
WIDTH = 1024
KINDS = ("weight", "optimizer.exp_avg", "optimizer.exp_avg_sq")
State = dict[str, Tensor]


class Way(Protocol):
    """One way to write a rank's state into a folder and to read it back."""

    def save(self, folder: Path, state: State) -> None: ...
    def load(self, folder: Path, state: State) -> State: ...


class Loop:
    """Plain calls over one range of memory."""

    def __init__(self, flags: int = 0) -> None:
        self.flags = flags

    def save(self, folder: Path, state: State) -> None:
        self._move(folder, state, os.O_WRONLY | os.O_CREAT, os.pwritev)
        sync(folder)

    def load(self, folder: Path, state: State) -> State:
        self._move(folder, state, os.O_RDONLY, os.preadv)
        return state

    def _move(self, folder: Path, state: State, mode: int, call: Callable[..., int]) -> None:
        fd, offset = os.open(folder / f"rank{dist.get_rank()}", mode | self.flags, 0o600), 0
        for memory in map(memory_of, state.values()):
            for begin in range(0, len(memory), CALL_BYTES):
                part = memory[begin : begin + CALL_BYTES]
                assert call(fd, [part], offset + begin) == len(part)
            offset += len(memory)
        if mode & os.O_CREAT:
            os.fsync(fd)
        os.close(fd)


class Craken:
    """This library's format."""

    def save(self, folder: Path, state: State) -> None:
        from craken.checkpoint import Piece, save
        from craken.comm import world_axis

        pieces = [Piece(name.split("/")[0], self._spec(name, tensor), tensor) for name, tensor in state.items()]
        save(folder, "tag", pieces=pieces, axis=world_axis(), rank_state={}, shared_state={})

    def load(self, folder: Path, state: State) -> State:
        from craken.checkpoint import Reader, Wish

        wishes = [Wish(name.split("/")[0], self._spec(name, tensor), tensor) for name, tensor in state.items()]
        Reader(folder).read_all(wishes)
        return state

    def _spec(self, name: str, tensor: Tensor) -> Any:
        from craken.spec import ShardSpec

        numel = tensor.numel()  # every rank holds as much of each tensor
        return ShardSpec(name.split("/")[1], (numel * dist.get_world_size(),), numel * dist.get_rank(), numel)


class TorchSave:
    """A pickle with the tensors beside it in a zip file, one a rank."""

    def save(self, folder: Path, state: State) -> None:
        with open(folder / f"rank{dist.get_rank()}.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        sync(folder)

    def load(self, folder: Path, state: State) -> State:
        found: State = torch.load(folder / f"rank{dist.get_rank()}.pt", weights_only=True)
        return found


class Dcp:
    """torch.distributed.checkpoint; ranks' tensors go by different names, so that none counts as a replica."""

    def save(self, folder: Path, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.FileSystemWriter(folder / "tag", sync_files=True)
        dcp.save(self._named(state), storage_writer=writer)
        sync(folder / "tag")

    def load(self, folder: Path, state: State) -> State:
        import torch.distributed.checkpoint as dcp

        dcp.load(self._named(state), storage_reader=dcp.FileSystemReader(folder / "tag"))
        return state

    def _named(self, state: State) -> State:
        return {f"{name}@{dist.get_rank()}": tensor for name, tensor in state.items()}


WAYS: dict[str, Way] = {
    "loop": Loop(),
    "direct": Loop(os.O_DIRECT),
    "craken": Craken(),
    "torch": TorchSave(),
    "dcp": Dcp(),
}
PLAIN = ("loop", "direct")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", default=list(WAYS), help=", ".join(WAYS))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gb-per-rank", type=float, default=1.0)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure; cleaned up behind")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stall", action="store_true", help="of saves in the background")
    options = parser.parse_args(arguments)
    if not set(PLAIN) <= set(options.ways) or not set(options.ways) <= set(WAYS):
        parser.error(f"expected {', '.join(PLAIN)} and any of {', '.join(WAYS)}, got {' '.join(options.ways)}")
    return options


# ---- on a rank -------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One way's turn in one round on this rank."""

    save_s: float
    load_s: float
    save_extra_mb: float
    load_extra_mb: float


def measure(options: argparse.Namespace) -> dict[str, list[Measured]]:
    """Save and load by every way, round after round."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    state, target = new_state(options.gb_per_rank), new_state(options.gb_per_rank)
    found: dict[str, list[Measured]] = {name: [] for name in options.ways}
    for number in range(options.rounds):
        for name in options.ways:
            folder = Path(options.folder) / f"{name}{number}"
            folder.mkdir(exist_ok=True)
            found[name].append(measure_way(WAYS[name], folder, state, target))
    dist.destroy_process_group()
    return found


def measure_way(way: Way, folder: Path, state: State, target: State) -> Measured:
    for tensor in target.values():
        tensor.zero_()
    save_s, save_extra_mb = timed(lambda: way.save(folder, state))
    if dist.get_rank() == 0:
        drop_from_cache(folder)
    loaded: list[State] = []
    load_s, load_extra_mb = timed(lambda: loaded.append(way.load(folder, target)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded[0].items())
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
        os.sync()
    return Measured(save_s, load_s, save_extra_mb, load_extra_mb)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Return the seconds from barrier to barrier, and the MB by which memory rose over what was and what stays."""
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    dist.barrier()
    begin_s = time.perf_counter()
    work()
    dist.barrier()
    elapsed_s = time.perf_counter() - begin_s
    return elapsed_s, status_mb("VmHWM") - max(before, status_mb("VmRSS"))


def status_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def new_state(gb: float) -> State:
    """Return `gb` GB of random numbers as tensors [numel] of 16 MiB in memory that direct I/O takes, by kind/name."""
    num_tensors = max(1, round(gb * 1e9 / TENSOR_BYTES))
    return {f"{KINDS[i % len(KINDS)]}/layer{i // len(KINDS)}": random_pages(TENSOR_BYTES) for i in range(num_tensors)}


def random_pages(num_bytes: int) -> Tensor:
    numbers = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.int64)
    return numbers.random_().view(torch.float32).nan_to_num_()  # NaNs would differ from themselves


def memory_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy().data)


def measure_stalls(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Save an engine in the background, round after round; returns (stall, plain copy) in seconds, the first apart."""
    import craken

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    num_layers = round(options.gb_per_rank * 1e9 * dist.get_world_size() / (12 * WIDTH**2))  # fp32 and two moments
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, num_layers))))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 2},
        "checkpoint": {"async_save": True},
    }
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    source, kept = torch.empty(0), torch.empty(0)
    found: list[tuple[float, float]] = []
    for number in range(options.rounds + 1):
        engine.backward(engine(torch.randn(1, WIDTH)).sum())
        engine.step()
        dist.barrier()
        begin_s = time.perf_counter()
        engine.save_checkpoint(options.folder, tag=f"stall{number}")
        stall_s = time.perf_counter() - begin_s
        engine.wait_for_checkpoint()
        if number == 0:
            source = torch.randint(255, (engine.checkpoint_stall.num_bytes,), dtype=torch.uint8)
        dist.barrier()
        begin_s = time.perf_counter()
        if number == 0:
            kept = source.clone()
        else:
            kept.copy_(source)
        found.append((stall_s, time.perf_counter() - begin_s))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(Path(options.folder) / f"stall{number}")
            os.sync()
    engine.destroy()
    dist.destroy_process_group()
    return {"turns": found}


def sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def drop_from_cache(folder: Path) -> None:
    for path in files_in(folder):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


# ---- over the ranks --------------------------------------------------------------------------------------------------

COLUMNS = {
    "save_gb_per_s": ("save GB/s", ".2f"),
    "save_x_disk": ("x disk", ".2f"),
    "load_gb_per_s": ("load GB/s", ".2f"),
    "load_x_disk": ("x disk", ".2f"),
    "save_extra_mb": ("save +MB", ".0f"),
    "load_extra_mb": ("load +MB", ".0f"),
}


def rows_of(ranks: list[dict[str, list[list[float]]]], num_bytes: int) -> dict[str, dict[str, float]]:
    """Put ranks and rounds together: the slowest rank's time, medians over rounds."""
    worst = {
        name: [
            Measured(*map(max, zip(*turn, strict=True))) for turn in zip(*(rank[name] for rank in ranks), strict=True)
        ]
        for name in ranks[0]
    }
    rows: dict[str, dict[str, float]] = {}
    for name, turns in worst.items():
        rows[name] = row = {key: statistics.median(getattr(turn, key) for turn in turns) for key in Measured._fields}
        for verb in ("save", "load"):
            times = [getattr(turn, f"{verb}_s") for turn in turns]
            plain = [min(getattr(worst[one][i], f"{verb}_s") for one in PLAIN) for i in range(len(turns))]
            row[f"{verb}_gb_per_s"] = num_bytes / 1e9 / statistics.median(times)
            row[f"{verb}_x_disk"] = statistics.median(p / t for p, t in zip(plain, times, strict=True))
    return rows


def stall_table(ranks: list[dict[str, list[tuple[float, float]]]]) -> str:
    """Put ranks and rounds together: the slowest rank's times; medians over all saves but the first."""
    turns = [tuple(map(max, zip(*turn, strict=True))) for turn in zip(*(rank["turns"] for rank in ranks), strict=True)]
    stalls, copies = zip(*turns[1:], strict=True)
    ratio = statistics.median(stall / copy for stall, copy in turns[1:])
    later = (statistics.median(stalls), statistics.median(copies), ratio)
    first = (*turns[0], turns[0][0] / turns[0][1])
    lines = [f"{'save':10}{'stall ms':>11}{'copy ms':>11}{'x copy':>11}"]
    for name, (stall_s, copy_s, times) in (("first", first), ("later", later)):
        lines.append(f"{name:10}{stall_s * 1e3:>11.0f}{copy_s * 1e3:>11.0f}{times:>11.2f}")
    return "\n".join(lines)


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [f"{'way':10}" + "".join(f"{head:>11}" for head, _ in COLUMNS.values())]
    for name, row in rows.items():
        lines.append(f"{name:10}" + "".join(f"{format(row[key], form):>11}" for key, (_, form) in COLUMNS.items()))
    return "\n".join(lines)


def main() -> None:
    options = parse()
    if is_rank():
        print(json.dumps(measure_stalls(options) if options.stall else measure(options)), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="craken-checkpoint-") as folder:
        flags = [f"--rounds={options.rounds}", f"--gb-per-rank={options.gb_per_rank}", f"--folder={folder}"]
        flags += ["--stall"] * options.stall
        ranks = run_on_ranks([sys.executable, __file__, *options.ways, *flags], options.ranks, timeout_s=3600)
    if options.stall:
        print(stall_table(ranks))
        return
    num_bytes = options.ranks * TENSOR_BYTES * max(1, round(options.gb_per_rank * 1e9 / TENSOR_BYTES))
    rows = rows_of(ranks, num_bytes)
    print(table(rows))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
