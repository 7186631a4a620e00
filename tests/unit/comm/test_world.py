"""Joining a job: what goes wrong is said before anything waits."""

import socket

import pytest
import torch.distributed as dist

from craken.comm import (
    get_accelerator,
    get_rank,
    get_world_size,
    init_distributed,
    is_initialized,
    shutdown,
    world_axis,
)
from craken.comm.accelerator import get_accelerator as uncached


@pytest.fixture
def clean(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    shutdown()


def test_without_a_launcher_the_world_is_this_process(clean):
    assert not is_initialized()
    init_distributed()
    assert is_initialized()
    assert (get_rank(), get_world_size()) == (0, 1)
    axis = world_axis()
    assert (axis.rank, axis.size, axis.backend) == (0, 1, "gloo")


def test_a_group_that_is_there_is_adopted(clean):
    init_distributed()
    group = dist.group.WORLD
    init_distributed("nccl")  # would fail if it were not a no-op
    assert dist.group.WORLD is group


def test_an_axis_before_the_group_says_what_to_call(clean):
    with pytest.raises(RuntimeError, match=r"call init_distributed\(\)"):
        world_axis()


def test_a_taken_port_is_named_with_the_flag_to_change_it(clean):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            clean.setenv(name, str(value))
        with pytest.raises(RuntimeError, match=f"port {port} on this host is taken.*--master_port"):
            init_distributed()


def test_rank_without_world_size_is_refused(clean):
    clean.setenv("RANK", "1")
    clean.setenv("MASTER_ADDR", "127.0.0.1")
    clean.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'two'; expected a whole number"):
        init_distributed()
    clean.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="expected RANK and WORLD_SIZE together"):
        init_distributed(init_method="env://")


def test_no_gloo_and_no_accelerator_is_one_clear_message(clean):
    clean.setattr(dist, "is_gloo_available", lambda: False)
    with pytest.raises(RuntimeError, match="has no gloo backend; expected one with it"):
        init_distributed("gloo")


@pytest.mark.skipif(not get_accelerator().is_cpu, reason="needs a machine without CUDA")
def test_nccl_without_cuda_names_the_backend_to_use(clean):
    clean.setattr(dist, "is_nccl_available", lambda: True)
    with pytest.raises(RuntimeError, match="nccl backend needs CUDA devices.*dist_backend='gloo'"):
        init_distributed("nccl")


@pytest.mark.parametrize(("value", "message"), [("tpu", "expected 'cpu' or 'cuda'"), ("cuda", "finds no CUDA device")])
def test_an_accelerator_that_is_not_there_is_refused(monkeypatch, value, message):
    if value == "cuda" and not get_accelerator().is_cpu:
        pytest.skip("CUDA is there")
    uncached.cache_clear()
    monkeypatch.setenv("DS_ACCELERATOR", value)
    with pytest.raises(ValueError, match=message):
        get_accelerator()
    uncached.cache_clear()


def test_the_accelerator_answers_with_bytes():
    accelerator = get_accelerator()
    assert 0 < accelerator.memory_allocated() <= accelerator.max_memory_allocated() * 1.5
    assert accelerator.available_memory() < accelerator.total_memory()
