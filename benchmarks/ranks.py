"""Starts a benchmark's ranks as plain processes, one thread each, and collects a line of JSON from every one."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def is_rank() -> bool:
    return "RANK" in os.environ


def run_on_ranks(
    command: list[str], num_ranks: int, *, timeout_s: float = 900.0, variables: Mapping[str, object] | None = None
) -> list[dict[str, Any]]:
    """Run `command` on every rank and return the JSON object that each printed last, in rank order.

    Ranks are given one thread each, and the CPU, unless `variables` of the environment say otherwise. Raises
    RuntimeError with the end of the first failing rank's stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        outputs = [open(Path(folder) / f"{rank}.out", "w+") for rank in range(num_ranks)]  # noqa: SIM115
        errors = [open(Path(folder) / f"{rank}.err", "w+") for rank in range(num_ranks)]  # noqa: SIM115
        processes = [
            subprocess.Popen(
                command, env=_environment(command[0], rank, num_ranks, port, variables or {}), stdout=out, stderr=err
            )
            for rank, (out, err) in enumerate(zip(outputs, errors, strict=True))
        ]
        try:
            for process in processes:
                process.wait(timeout_s)
        finally:
            for process in processes:
                process.kill()
            # the original leaves 69 MB a rank in shared memory, named after the port
            for leftover in Path("/dev/shm").glob(f"*_127.0.0.1_{port}_*"):
                leftover.unlink()
        for rank, process in enumerate(processes):
            if process.returncode:
                errors[rank].seek(0)
                raise RuntimeError(f"rank {rank} exit {process.returncode}\n{errors[rank].read()[-2000:]}")
        results = [_last_object(Path(file.name)) for file in outputs]
        for file in (*outputs, *errors):
            file.close()
    return results


def _last_object(path: Path) -> dict[str, Any]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"a rank ended without a result: {path.read_text()[-500:]!r}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _environment(python: str, rank: int, num_ranks: int, port: int, variables: Mapping[str, object]) -> dict[str, str]:
    # compiled extensions (the original's) belong to one Python: a folder for each, kept between runs
    folder = Path(tempfile.gettempdir()) / f"bench-extensions-{hashlib.sha1(python.encode()).hexdigest()[:8]}"
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "LOCAL_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        **variables,
    }
    return {"TORCH_EXTENSIONS_DIR": str(folder), **os.environ, **{name: str(value) for name, value in launched.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
