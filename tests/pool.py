"""Worker processes that run one function on several gloo ranks; started once, so a test costs tenths of a second.

    pytest process                      worker r (one process, kept for the whole session)
    ---------------------------------   -----------------------------------------------------
    sends (function by name, args)  ->  joins a fresh world, runs function(*args)
    collects every rank's outcome   <-  value or traceback
    tells all to finish             ->  takes craken and the world down, looks for what leaked
    collects                        <-  done

Workers come from a fork server that has imported torch and never touched it. Every world joins a fresh store that the
pytest process holds, found through the variables that a launcher sets. A rank that fails tears its world
down, so that the others fail too instead of waiting. A hang ends with the stacks of all ranks, and a fresh pool.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_GRACE_S = 15.0  # how long other ranks may go on after one has failed


@dataclass(frozen=True)
class Job:
    """What one rank is asked to run."""

    module: str
    file: str
    qualname: str
    arguments: bytes  # pickled (args, kwargs)
    search_path: list[str]
    environment: dict[str, str]
    joins_world: bool


@dataclass(frozen=True)
class Outcome:
    """What one rank answers; `value` is pickled, `problem` a traceback or a leak."""

    value: bytes | None = None
    problem: str | None = None


class RanksFailed(AssertionError):
    """At least one rank failed; the message shows each one's traceback, the first to fail first."""


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    output: Path  # what the rank wrote to stdout and stderr, and its stacks when asked


@dataclass
class Pool:
    """Up to `num_workers` processes; tests of 2 and 4 ranks share them."""

    folder: Path
    _workers: list[_Worker] = field(default_factory=list)
    _store: Any = None  # of the last world; the pytest process serves it

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        timeout_s: float = 60.0,
        joins_world: bool = True,
    ) -> list[Any]:
        """Run module-level `function` on ranks 0..world_size-1 and return their results in rank order.

        joins_world: the default process group is up when `function` starts; else only the variables are set.
        Raises RanksFailed with the tracebacks, or with all stacks after `timeout_s` seconds.
        """
        from torch.distributed import TCPStore

        self._start(world_size)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        workers = self._workers[:world_size]
        for rank, worker in enumerate(workers):
            worker.output.write_bytes(b"")
            worker.pipe.send(self._job(function, rank, world_size, (args, kwargs or {}), joins_world))
        try:
            outcomes = self._collect(workers, timeout_s, finish_failed=True)
            for rank, worker in enumerate(workers):
                if outcomes[rank].problem is None:
                    worker.pipe.send("finish")
            leaks = self._collect(workers, timeout_s, finish_failed=False)
        except BaseException as error:
            self.stop()  # answers under way would be taken for the next test's
            if isinstance(error, _PoolBrokenError):
                raise RanksFailed(str(error)) from None
            raise
        problems = [(rank, o.problem) for rank, o in [*outcomes.items(), *leaks.items()] if o.problem]
        if problems:
            raise RanksFailed(_report(problems, workers))
        return [pickle.loads(outcomes[rank].value or b"") for rank in range(world_size)]

    def stop(self) -> None:
        """End all workers; the next run starts new ones."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def _start(self, num_workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        # torch.optim imports torch._dynamo at its first use: a second for every worker, or once here
        context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "craken.api"])
        with _environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}):  # read when torch is imported
            for rank in range(len(self._workers), num_workers):
                ours, theirs = context.Pipe()
                output = self.folder / f"rank{rank}.txt"
                process = context.Process(target=_serve, args=(theirs, str(output)), name=f"rank{rank}", daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours, output))

    def _job(
        self, function: Callable[..., Any], rank: int, world_size: int, arguments: tuple[Any, Any], joins_world: bool
    ) -> Job:
        if "<locals>" in function.__qualname__ or "<lambda>" in function.__qualname__:
            raise ValueError(f"{function.__qualname__} is not at module level; ranks find their function by name")
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # as under torch's agent: the store is already there
        }
        module = sys.modules[function.__module__]
        return Job(
            function.__module__,
            str(module.__file__),
            function.__qualname__,
            pickle.dumps(arguments),
            list(sys.path),
            environment,
            joins_world,
        )

    def _collect(self, workers: list[_Worker], timeout_s: float, *, finish_failed: bool) -> dict[int, Outcome]:
        """Return rank -> outcome, in order of arrival; a failed rank is told to finish at once."""
        waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise _PoolBrokenError(_hang_report(workers, sorted(waiting.values()), outcomes))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    outcomes[rank] = pipe.recv()
                except EOFError:
                    raise _PoolBrokenError(_death_report(workers, rank, outcomes)) from None
                if outcomes[rank].problem is not None and finish_failed:
                    pipe.send("finish")
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return outcomes


class _PoolBrokenError(Exception):
    """A rank hangs or has died: the workers can't be used again."""


def _report(problems: list[tuple[int, str]], workers: list[_Worker]) -> str:
    parts = [f"---- rank {rank} of {len(workers)} ----\n{problem}" for rank, problem in problems]
    output = [f"---- output of rank {rank} ----\n{text}" for rank, text in enumerate(_outputs(workers)) if text]
    return "\n" + "\n".join([*parts, *output])


def _outputs(workers: list[_Worker]) -> list[str]:
    return [worker.output.read_text(errors="replace")[-6000:].strip() for worker in workers]


def _death_report(workers: list[_Worker], rank: int, outcomes: dict[int, Outcome]) -> str:
    workers[rank].process.join(5)
    code = workers[rank].process.exitcode
    how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
    problems = [(r, o.problem) for r, o in outcomes.items() if o.problem]
    return _report([(rank, f"the process died: {how}"), *problems], workers)


def _hang_report(workers: list[_Worker], hanging: list[int], outcomes: dict[int, Outcome]) -> str:
    for worker in workers:
        if worker.process.pid is not None and worker.process.is_alive():
            os.kill(worker.process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    problems = [(rank, o.problem) for rank, o in outcomes.items() if o.problem]
    return _report([*problems, *((rank, "did not finish in time; its stacks are below") for rank in hanging)], workers)


# ---- in the worker ----


def _serve(pipe: Connection, output: str) -> None:
    """Run jobs until the pytest process is gone."""
    import faulthandler

    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to pytest, which then ends us
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the imports left is no garbage; collecting between tests stays cheap
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        with _environment(job.environment):
            before = _global_state()
            pipe.send(_run(job))
            pipe.recv()
            pipe.send(_clean_up(before))


def _run(job: Job) -> Outcome:
    import torch
    import torch.distributed as dist

    torch.manual_seed(0)  # alike on all ranks, whatever ran before
    try:
        sys.path[:] = job.search_path
        function: Any = _import(job)
        for name in job.qualname.split("."):
            function = getattr(function, name)
        args, kwargs = pickle.loads(job.arguments)
        if job.joins_world:
            dist.init_process_group("gloo")
        return Outcome(value=pickle.dumps(function(*args, **kwargs)))
    except BaseException:  # noqa: BLE001 - it is carried to the pytest process, which raises
        return Outcome(problem=traceback.format_exc())


def _import(job: Job) -> ModuleType:
    """Import the test's module under the name it has in the pytest process, whatever the import mode there."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(job.module)
    spec = importlib.util.spec_from_file_location(job.module, job.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[job.module] = module
    spec.loader.exec_module(module)
    return module


def _clean_up(before: dict[str, str]) -> Outcome:
    import torch.distributed as dist

    try:
        gc.collect()  # engines sit in reference cycles with their hooks
        if (comm := sys.modules.get("craken.comm")) is not None:
            comm.shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
        after = _global_state()
        leaked = [f"{name}: {before[name]} -> {after[name]}" for name in before if after.get(name) != before[name]]
        return Outcome(problem="global state of craken outlived the test:\n" + "\n".join(leaked) if leaked else None)
    except BaseException:  # noqa: BLE001 - it is carried to the pytest process, which raises
        return Outcome(problem="while taking the world down:\n" + traceback.format_exc())


def _global_state() -> dict[str, str]:
    """Describe the plain values and containers that craken's loaded modules hold at module level.

    What a process says or counts once in its life is meant to stay: the warnings said, the bytes sent.
    """
    lasting = {"craken.log._said"}
    return {
        f"{name}.{key}": repr(value)[:200]
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "craken"
        for key, value in vars(module).items()
        if not key.startswith("__") and f"{name}.{key}" not in lasting
        if value is None or isinstance(value, bool | int | float | str | list | dict | set)
    }


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and put the whole environment back afterwards."""
    saved = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def new_pool() -> Pool:
    return Pool(Path(tempfile.mkdtemp(prefix="craken-ranks-")))
