"""Shards that rest on the host or in files: the same numbers to the bit, and each byte where it belongs.

Here host and device are one memory; tests of offload to the host turn that off, so that every copy is made.
"""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.parity.case import Case
from tests.parity.model import batch, tiny_gpt
from tests.parity.plain import weights_of

STEPS = 4
HOST, DISK = "cpu", "nvme"
HOST_STATES = {"offload_optimizer": {"device": HOST}}


def offload_sections(states: str, weights: str, folder: str) -> dict[str, Any]:
    """Return the config's two sections; "none" is written as well."""
    return {
        "offload_optimizer": {"device": states, "nvme_path": folder, "buffer_count": 2},
        "offload_param": {"device": weights, "nvme_path": folder, "buffer_count": 2},
    }


def train(case: Case, stage: int, states: str = "none", weights: str = "none", folder: str = "") -> dict[str, Any]:
    """Train a few steps with host and device kept apart; return losses, norms, weights, bytes sent."""
    import craken
    from craken import comm
    from craken.engine import offload
    from craken.zero import Link

    config = case.config(stage)
    if states != "none" or weights != "none":
        config["zero_optimization"] |= offload_sections(states, weights, folder)
    model = tiny_gpt(case.traits)
    with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
        engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    losses, norms, before = [], [], comm.bytes_sent()
    for step, micro in itertools.product(range(STEPS), range(case.accumulation)):
        loss = engine(batch(step, micro, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        engine.check_integrity()
        losses.append(loss.item())
        norms.append(engine.get_global_grad_norm())
    found = {"losses": losses, "norms": norms, "bytes": comm.bytes_sent() - before, "weights": weights_of(model)}
    found["files"] = os.listdir(folder) if folder else []
    engine.destroy()
    return found


def train_beside(case: Case, stage: int, states: str, weights: str, folder: str) -> list[dict[str, Any]]:
    return [train(case, stage), train(case, stage, states, weights, folder)]


COMBINATIONS = [
    (1, HOST, "none"),
    (2, HOST, "none"),
    (2, DISK, "none"),
    (3, HOST, "none"),
    (3, "none", HOST),
    (3, HOST, HOST),
    (3, DISK, "none"),
    (3, "none", DISK),
    (3, DISK, HOST),
    (3, HOST, DISK),
    (3, DISK, DISK),
]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "states", "weights"), COMBINATIONS)
def test_offload_changes_no_bit(run_ranks, tmp_path: Path, stage, states, weights, dtype, accumulation) -> None:
    case = Case(dtype, 2, accumulation, clip=0.5)
    for plain, offloaded in run_ranks(train_beside, 2, case, stage, states, weights, str(tmp_path)):
        assert offloaded["losses"] == plain["losses"]
        assert offloaded["norms"] == plain["norms"]
        assert offloaded["bytes"] == plain["bytes"], "offload sent something over the wire"
        for name, weight in plain["weights"].items():
            assert torch.equal(offloaded["weights"][name], weight), name
        assert offloaded["files"] == [], "swap files have names"


NUMEL = 8 * 64 * 64  # no padding: every group divides by ranks and by 32


def held(stage: int, states: str, weights: str, dtype: str, folder: str) -> dict[str, int]:
    """Return the ledger of one rank after two steps and a forward; until that, gradients could still be read."""
    import craken
    from craken.engine import offload
    from craken.zero import Link

    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    zero = {"stage": stage, "reduce_bucket_size": 8192, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {**zero, **offload_sections(states, weights, folder)},
        "bf16": {"enabled": dtype == "bf16"},
    }
    with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
        engine, *_ = craken.initialize(model=model, config=config)
    x = torch.ones(1, 64).to(model[0].weight.dtype)
    for _ in range(2):
        engine.backward(engine(x).float().square().mean())
        engine.step()
    with torch.no_grad():
        engine(x)
    ledger = engine.memory_ledger()
    engine.destroy()
    return ledger


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "states", "weights"), [(2, "none", "none"), (3, "none", "none"), *COMBINATIONS])
def test_every_byte_is_where_it_belongs(run_ranks, tmp_path: Path, stage, states, weights, dtype) -> None:
    places, shard = {"none": "device", HOST: "host", DISK: "nvme"}, NUMEL // 2
    itemsize = 2 if dtype == "bf16" else 4
    is_one_copy = dtype == "fp32" and states == weights  # the master is the weights this rank keeps
    expected = dict.fromkeys(("device", "host", "nvme"), 0)
    expected[places[weights]] += itemsize * (NUMEL if stage < 3 else shard)
    expected[places[states]] += (8 if is_one_copy else 12) * shard
    if states != "none":
        expected["host"] += itemsize * shard  # gradients come and go in memory that stays
    assert run_ranks(held, 2, stage, states, weights, dtype, str(tmp_path)) == [expected] * 2


def leave_and_return(stage: int) -> None:
    """Steps before and after `offload_states` are those of an engine that stayed."""
    import craken
    from craken.engine import offload
    from craken.zero import Link

    case = Case("bf16", 2, clip=0.5)
    results = []
    for leaves in (False, True):
        model = tiny_gpt(case.traits)
        with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
            engine, *_ = craken.initialize(model=model, config=case.config(stage))
        for step in range(3):
            if leaves and step:
                before = engine.memory_ledger()["device"]
                engine.offload_states(include=["optim_states", "hp_params", "lp_params"])
                held = [
                    param.untyped_storage().nbytes() for group in engine.groups for param in (group.master, group.kept)
                ]
                assert before > 0
                assert sum(held) == 0
                with pytest.raises(RuntimeError, match="call reload_states"):
                    engine(batch(step, 0, dist.get_rank()))
                engine.reload_states()
            engine.backward(engine(batch(step, 0, dist.get_rank())))
            engine.step()
        results.append(weights_of(model))
        engine.destroy()
    for name, weight in results[0].items():
        assert torch.equal(weight, results[1][name]), name


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_states_leave_the_device_and_return(run_ranks, stage) -> None:
    run_ranks(leave_and_return, 2, stage)


def split_between_host_and_device(ratio: float) -> tuple[dict[str, int], list[bool]]:
    import craken
    from craken.engine import offload
    from craken.zero import Link, Place

    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    zero = {"stage": 3, "reduce_bucket_size": 4096, "stage3_param_persistence_threshold": 0}
    zero |= {"offload_optimizer": {"device": "cpu", "ratio": ratio}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": zero,
        "bf16": {"enabled": True},
    }
    with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
        engine, *_ = craken.initialize(model=model, config=config)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    engine.backward(engine(x).float().square().mean())
    engine.step()
    with torch.no_grad():
        engine(x)
    places = [group.rules.placement.states is Place.HOST for group in engine.groups]
    ledger = engine.memory_ledger()
    engine.destroy()
    return ledger, places


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_ratio_keeps_a_part_of_the_states_on_the_device(run_ranks, ratio) -> None:
    shard = NUMEL // 2
    for ledger, places in run_ranks(split_between_host_and_device, 2, ratio):
        assert sum(places) == ratio * len(places)
        assert ledger["host"] == ratio * (12 + 2) * shard  # states, and gradients on their way
        assert ledger["device"] == 2 * shard + (1 - ratio) * 12 * shard


def start(stage: int, sections: dict[str, Any], optimizer: Any = None, dtype: str = "bf16") -> tuple[Any, Any]:
    """Return an engine with host and device kept apart, and its model."""
    import craken
    from craken.engine import offload
    from craken.zero import Link

    case = Case(dtype, 2)
    config = case.config(stage)
    config["zero_optimization"] |= sections
    if optimizer is not None:
        config["optimizer"] = optimizer
    model = tiny_gpt(case.traits)
    with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
        engine, *_ = craken.initialize(model=model, config=config)
    return engine, model


def step(engine: Any, number: int) -> None:
    engine.backward(engine(batch(number, 0, dist.get_rank())))
    engine.step()


def masters(engine: Any) -> list[torch.Tensor]:
    return [fragment.tensor.detach().clone() for group in engine.groups for fragment in group.fragments]


def all_at_once(stage: int, optimizer: dict[str, Any]) -> None:
    found = []
    for sections in ({}, HOST_STATES):
        engine, _ = start(stage, sections, optimizer)
        for number in range(3):
            step(engine, number)
        found.append(masters(engine))
        engine.destroy()
    for plain, offloaded in zip(*found, strict=True):
        assert torch.equal(plain, offloaded)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["Lamb", "Muon"])
def test_optimizers_that_update_all_at_once_see_their_own_gradients(run_ranks, stage, kind) -> None:
    run_ranks(all_at_once, 2, stage, {"type": kind, "params": {"lr": 1e-2}})


def load_in_mid_step(folder: str, states: str) -> float:
    engine, _ = start(2, offload_sections(states, "none", folder))
    step(engine, 0)
    engine.save_checkpoint(folder + "/saved")
    engine.backward(engine(batch(1, 0, dist.get_rank())))
    engine.load_checkpoint(folder + "/saved", load_module_only=True)
    step(engine, 2)
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return float(norm)


def test_weights_that_are_loaded_in_mid_step_are_not_taken_for_gradients(run_ranks, tmp_path: Path) -> None:
    norms = [run_ranks(load_in_mid_step, 2, str(tmp_path / states), states) for states in ("none", HOST, DISK)]
    assert norms[1] == norms[2] == norms[0]


def accumulate_late(sections: dict[str, Any]) -> list[torch.Tensor]:
    engine, _ = start(2, sections)
    step(engine, 0)
    for is_boundary in (False, True):
        engine.set_gradient_accumulation_boundary(is_boundary)
        engine.backward(engine(batch(1, int(is_boundary), dist.get_rank())))
    engine.step()
    found = masters(engine)
    engine.destroy()
    return found


def test_sums_on_the_host_are_in_fp32_once_accumulation_is_found_out(run_ranks) -> None:
    plain = run_ranks(accumulate_late, 2, {})
    offloaded = run_ranks(accumulate_late, 2, HOST_STATES)
    for mine, other in zip(plain, offloaded, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def replace_and_fail(folder: str) -> None:
    """States that a user replaces count, and what was read ahead of a step that failed does not."""
    from craken.zero import safe_get_full_fp32_param, safe_set_full_fp32_param

    engine, model = start(3, offload_sections(DISK, "none", folder))
    step(engine, 0)
    inner = engine.optimizer.optimizer
    failing = mock.patch.object(type(inner), "step", side_effect=OSError("a disk fails"))
    with failing, pytest.raises(OSError, match="a disk fails"):
        step(engine, 1)
    engine.discard_gradients()
    weight = model.blocks[0].up.weight
    safe_set_full_fp32_param(weight, torch.full(weight.ds_shape, 5.0))
    step(engine, 2)
    assert (safe_get_full_fp32_param(weight) > 4).all()
    saved = inner.state_dict()
    for state in saved["state"].values():
        state["exp_avg"] = torch.ones_like(state["exp_avg"])
    inner.load_state_dict(saved)
    step(engine, 3)
    averages = [state["exp_avg"] for state in inner.state.values() if state["exp_avg"].numel()]
    assert all((average > 0.5).all() for average in averages), "the loaded moments were lost"
    engine.destroy()


def test_what_lies_in_files_follows_what_users_set(run_ranks, tmp_path: Path) -> None:
    run_ranks(replace_and_fail, 2, str(tmp_path))


def let_go(folder: str) -> None:
    import gc
    import weakref

    engine, model = start(3, offload_sections(DISK, DISK, folder))
    step(engine, 0)
    shelf, in_use = engine.parts.shelf, engine.parts.shelf.num_bytes
    states = weakref.ref(next(iter(engine.optimizer.optimizer.state.values()))["exp_avg"])
    engine.destroy()
    del engine
    gc.collect()
    assert states() is None, "moments outlive their engine"
    assert 0 < shelf.num_bytes < in_use / 2, "only the weights are still needed"
    assert all(param.shape == (0,) for param in model.parameters() if param.requires_grad)


def test_states_go_with_their_engine(run_ranks, tmp_path: Path) -> None:
    run_ranks(let_go, 2, str(tmp_path))


def full_disk_on_one_rank(folder: str) -> str:
    from craken.disk import Swap

    real = Swap.file

    def refuse(swap: Any, name: str, num_bytes: int) -> Any:
        if dist.get_rank() == 1 and "exp_avg" in name:
            raise OSError(28, "cannot set space aside")
        return real(swap, name, num_bytes)

    with mock.patch.object(Swap, "file", refuse), pytest.raises(OSError, match="rank 1") as caught:
        start(3, offload_sections(DISK, "none", folder))
    return str(caught.value)


def wanted_and_taken(dtype: str, states: str, weights: str, folder: str) -> tuple[int, int]:
    """Return the bytes that this host's ranks were said to want, and those that they hold in files."""
    from craken.zero.memory import shelf

    with mock.patch.object(shelf, "Swap", side_effect=shelf.Swap) as made:
        ledger = held(3, states, weights, dtype, folder)
    (call,) = made.call_args_list  # both kinds in one folder
    return call.kwargs["expected_bytes"], ledger["nvme"] * dist.get_world_size()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("states", "weights"), [(DISK, "none"), ("none", DISK), (DISK, DISK)])
def test_what_files_will_take_is_known_before_they_are_made(run_ranks, tmp_path: Path, dtype, states, weights) -> None:
    for wanted, taken in run_ranks(wanted_and_taken, 2, dtype, states, weights, str(tmp_path)):
        masters_are_weights = dtype == "fp32" and weights == DISK
        weight_bytes = (4 if dtype == "fp32" else 2) * NUMEL if weights == DISK else 0
        assert wanted == (0 if states == "none" else (8 if masters_are_weights else 12) * NUMEL)
        assert taken == wanted + weight_bytes


def too_small_a_disk(folder: str) -> str:
    """Return the error where the disk has 64 KB, which single files of the model's would fit into."""
    with (
        mock.patch.object(os, "statvfs", return_value=mock.Mock(f_bavail=16, f_frsize=4096)),
        pytest.raises(OSError, match="free some space there") as caught,
    ):
        start(3, offload_sections(DISK, "none", folder))
    return str(caught.value)


def test_a_disk_too_small_for_all_is_refused_on_all_ranks_with_the_total(run_ranks, tmp_path: Path) -> None:
    for message in run_ranks(too_small_a_disk, 2, str(tmp_path)):
        assert "preparing offload failed on 2 of 2 ranks" in message
        assert "has 65,536 bytes free, expected " in message


def test_a_disk_without_room_for_moments_stops_all_ranks_before_the_first_step(run_ranks, tmp_path: Path) -> None:
    for message in run_ranks(full_disk_on_one_rank, 2, str(tmp_path)):
        assert "setting space aside for optimizer states failed on 1 of 2 ranks: rank 1" in message
