"""Brings the job's process group up and down; adopts one that the user has already made.

A process started without a launcher is a world of one rank: the same code, a group of size 1.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from craken.comm.accelerator import get_accelerator
from craken.comm.watchdog import stop_watching
from craken.log import logger

DEFAULT_TIMEOUT = timedelta(minutes=30)


def is_initialized() -> bool:
    """Say whether the job's process group is up."""
    return dist.is_available() and dist.is_initialized()


def get_rank(group: Any = None) -> int:
    return dist.get_rank(group) if is_initialized() else int(os.environ.get("RANK", "0"))


def get_world_size(group: Any = None) -> int:
    return dist.get_world_size(group) if is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def expected_world_size() -> int:
    """Return how many ranks the job has, or will have once they have met, as launchers and MPI say."""
    if is_initialized():
        return dist.get_world_size()
    return _first_int(_env_int("WORLD_SIZE"), _mpi("SIZE")) or 1


def get_local_rank() -> int:
    """Return this process's rank on its host, as the launcher set it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_local_world_size() -> int:
    """Return how many ranks there are on this process's host, as the launcher said; without one, all of them."""
    return _env_int("LOCAL_WORLD_SIZE") or get_world_size()


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = 29500,
    verbose: bool = True,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    **rendezvous: Any,
) -> None:
    """Bring the process group up, once: collective over all ranks of the job.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A group that is already there is adopted as it is.
    `rendezvous` takes `rank`, `world_size`, `config`, and `dist_init_required` (False: ValueError unless it is there).
    """
    accelerator = get_accelerator()
    if "LOCAL_RANK" in os.environ:
        accelerator.set_device(get_local_rank())
    if is_initialized():
        return
    if rendezvous.pop("dist_init_required", None) is False:
        raise ValueError(
            "dist_init_required=False says that a process group is there, and none is: "
            "call torch.distributed.init_process_group() first, or leave dist_init_required out"
        )
    backend = dist_backend or accelerator.communication_backend_name()
    _check_backend(backend)
    timeout = timeout or DEFAULT_TIMEOUT
    rank = _first_int(rendezvous.get("rank"), _env_int("RANK"), _mpi("RANK") if auto_mpi_discovery else None)
    world_size = _first_int(
        rendezvous.get("world_size"), _env_int("WORLD_SIZE"), _mpi("SIZE") if auto_mpi_discovery else None
    )
    if init_method is None and (world_size is None or (world_size == 1 and "MASTER_ADDR" not in os.environ)):
        dist.init_process_group(
            backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        return
    if rank is None or world_size is None:
        raise ValueError(
            f"expected RANK and WORLD_SIZE together, got RANK={os.environ.get('RANK')!r} and "
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')!r}; start with `deepspeed`, `craken launch` or `torchrun`"
        )
    _join(backend, init_method, rank, world_size, distributed_port, timeout)
    if verbose and rank == 0:
        logger.debug("process group up: %s, %d ranks", backend, world_size)


def shutdown() -> None:
    """Take the process group down, if there is one."""
    stop_watching()
    if is_initialized():
        dist.destroy_process_group()


def _join(backend: str, init_method: str | None, rank: int, world_size: int, port: int, timeout: timedelta) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))
    where = init_method or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if rank == 0 and init_method is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_port_is_free(int(os.environ["MASTER_PORT"]))
    device = None if get_accelerator().is_cpu else get_accelerator().device()
    try:
        dist.init_process_group(
            backend,
            init_method=init_method or "env://",
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"rank {rank} of {world_size} could not join the job at {where} with {backend}: {error}. Expected every "
            "rank to be started with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE, and the port to be free"
        ) from error


def _check_backend(backend: str) -> None:
    known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    for name in (part.split(":")[-1] for part in backend.split(",")):
        if name in known and not known[name]():
            raise RuntimeError(
                f"this build of torch {torch.__version__} has no {name} backend; expected one with it: install torch "
                "from its official wheels, or name another backend in init_distributed(dist_backend=...)"
            )
    if "nccl" in backend and get_accelerator().is_cpu:
        raise RuntimeError("the nccl backend needs CUDA devices and torch finds none; use dist_backend='gloo'")


def _check_port_is_free(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise RuntimeError(
                f"port {port} on this host is taken ({error.strerror}); another job may be running. "
                "Start with another --master_port (or MASTER_PORT)"
            ) from error


def _env_int(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdigit():
        raise ValueError(f"environment variable {name} is {value!r}; expected a whole number")
    return int(value)


def _mpi(what: str) -> int | None:
    """Read rank or size as Open MPI, MPICH (PMI) or Slurm set them."""
    names = {"RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK"), "SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")}
    return next((value for name in names[what] if (value := _env_int(name)) is not None), None)


def _first_int(*candidates: int | None) -> int | None:
    # rank 0 is a value and -1 is DeepSpeed's "not given"
    return next((value for value in candidates if value is not None and value >= 0), None)
