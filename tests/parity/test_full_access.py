"""Reading and writing one parameter's master, gradient and states, against a plain optimizer's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs, two_paths, value

stages = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def pairs_of(pair: Pair) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return list(zip(pair.model.parameters(), pair.twin.parameters(), strict=True))


def same(ours: Tensor | None, plain: Tensor | None, what: str) -> None:
    assert ours is not None, what
    torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-7, msg=lambda text: f"{what}: {text}")


def backward_both(pair: Pair, step: int) -> None:
    pair.engine.backward(error(pair.engine(inputs(step, pair.rank))))
    pair.twin_backward(step)


def reading(stage: int, config: dict[str, Any]) -> None:
    from craken.zero import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

    pair = Pair(stage, config=config)
    for param, plain in pairs_of(pair):
        same(safe_get_full_fp32_param(param), plain.detach(), "master")
        assert safe_get_full_grad(param) is None
        assert safe_get_full_optimizer_state(param, "exp_avg") is None
    for step in range(2):
        backward_both(pair, step)
        for param, plain in pairs_of(pair):
            same(safe_get_full_grad(param), plain.grad, "gradient")
        taken = [plain.grad for _, plain in pairs_of(pair)]
        pair.engine.step()
        pair.twin_step()
        for (param, plain), grad in zip(pairs_of(pair), taken, strict=True):
            same(safe_get_full_fp32_param(param), plain.detach(), "master")
            same(safe_get_full_grad(param), grad, "gradient that the step took")
            for key in ("exp_avg", "exp_avg_sq"):
                same(safe_get_full_optimizer_state(param, key), pair.twin_optimizer.state[plain][key], key)
            assert safe_get_full_optimizer_state(param, "step") == step + 1
            assert safe_get_full_optimizer_state(param, "momentum") is None
    pair.assert_same_weights()
    pair.close()


@stages
def test_what_an_engine_holds_of_a_parameter_is_read_whole(run_ranks, stage) -> None:
    run_ranks(reading, 2, stage, {})


def test_parameters_that_stay_whole_at_stage_3_are_read_too(run_ranks) -> None:
    run_ranks(reading, 2, 3, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**6}})


def reading_what_a_step_took(stage: int, settings: dict[str, Any]) -> None:
    """Clients whose backward takes the step too (accelerate's) can only ask afterwards."""
    from craken.zero import safe_get_full_grad, safe_get_local_grad, safe_set_full_grad

    pair, is_mixed = Pair(stage, config={"gradient_clipping": 0.1, **settings}), "fp16" in settings
    params = list(pair.model.parameters())
    for step in range(2):
        forward = pair.engine(inputs(step, pair.rank).half() if is_mixed else inputs(step, pair.rank))
        assert all(safe_get_full_grad(param) is None for param in params), "a forward begins with free memory"
        pair.engine.backward(error(forward))
        mean = [grad.clone() for param in params if (grad := safe_get_full_grad(param)) is not None]
        pair.engine.step()
        norm = pair.engine.get_global_grad_norm()
        assert norm > 0.2, "nothing to clip"
        for param, grad in zip(params, mean, strict=True):
            torch.testing.assert_close(safe_get_full_grad(param), grad * (0.1 / norm), rtol=1e-4, atol=1e-6)
            assert safe_get_local_grad(param) is not None
            with pytest.raises(RuntimeError, match="no gradient to set"):
                safe_set_full_grad(param, grad)
    assert not any(group.gradients.has_any for group in pair.engine.groups), "the next step would take them again"
    pair.engine.backward(error(forward.detach().requires_grad_()))
    assert all(group.gradients.taken is None for group in pair.engine.groups)
    pair.close()


FP16 = {"fp16": {"enabled": True, "loss_scale": 64.0}}
LION = {"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}}


@pytest.mark.parametrize("settings", [{}, FP16, LION], ids=["fp32", "fp16", "divided beforehand"])
@stages
def test_the_gradient_that_a_step_took_is_read_until_the_next_forward(run_ranks, stage, settings) -> None:
    run_ranks(reading_what_a_step_took, 2, stage, settings)


MESHES = [{"mics_shard_size": 2}, {"zero_hpz_partition_size": 2}]


@pytest.mark.parametrize("mesh", MESHES, ids=["MiCS", "hpZ"])
def test_what_is_sharded_over_a_part_of_the_ranks_is_read_whole(run_ranks, mesh) -> None:
    zero = {"stage": 3, "reduce_bucket_size": 20, "stage3_param_persistence_threshold": 0, **mesh}
    run_ranks(reading, 4, 3, {"zero_optimization": zero})


def writing(stage: int, settings: dict[str, Any]) -> None:
    from craken.zero import (
        safe_get_full_fp32_param,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
    )

    zero = {"stage": stage, "reduce_bucket_size": 20, "stage3_param_persistence_threshold": 0, **settings}
    pair = Pair(stage, config={"zero_optimization": zero})
    pair.step_both(0)
    for param, plain in pairs_of(pair):
        for key, factor in (("exp_avg", 2.0), ("exp_avg_sq", 3.0)):
            state = pair.twin_optimizer.state[plain][key]
            state.mul_(factor)
            safe_set_full_optimizer_state(param, state, key)
        plain.data.mul_(0.5).add_(0.25)
        safe_set_full_fp32_param(param, plain.detach())
        same(safe_get_full_fp32_param(param), plain.detach(), "master")
        same(value(param), plain.detach(), "weights")
    backward_both(pair, 1)
    for param, plain in pairs_of(pair):
        plain.grad.copy_(torch.linspace(-1, 1, plain.numel()).view(plain.shape))
        safe_set_full_grad(param, plain.grad)
    pair.engine.step()
    pair.twin_step()
    pair.step_both(2)
    pair.assert_same_weights()
    pair.close()


@stages
def test_what_is_written_is_what_the_next_step_takes(run_ranks, stage) -> None:
    run_ranks(writing, 2, stage, {})


def test_parameters_that_stay_whole_at_stage_3_are_written_too(run_ranks) -> None:
    run_ranks(writing, 2, 3, {"stage3_param_persistence_threshold": 10**6})


@pytest.mark.parametrize("mesh", MESHES, ids=["MiCS", "hpZ"])
def test_what_is_sharded_over_a_part_of_the_ranks_is_written_too(run_ranks, mesh) -> None:
    run_ranks(writing, 4, 3, mesh)


@pytest.mark.parametrize("where", ["cpu", "nvme"])
def test_what_has_left_the_device_is_read_and_written_too(run_ranks, tmp_path: Path, where) -> None:
    section = {"device": where, "nvme_path": str(tmp_path)}
    settings = {"offload_optimizer": section, "offload_param": section}
    run_ranks(writing, 2, 3, settings)
    run_ranks(reading, 2, 3, {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **settings}})


def reading_from_a_host_of_its_own(stage: int, section: dict[str, Any]) -> None:
    from craken.engine import offload
    from craken.zero import Link, safe_get_full_grad

    zero = {"stage": stage, "reduce_bucket_size": 20, "stage3_param_persistence_threshold": 0, **section}
    with mock.patch.object(offload, "Link", functools.partial(Link, host_is_device=False)):
        pair = Pair(stage, config={"zero_optimization": zero})
    for step in range(2):
        backward_both(pair, step)
        for param, plain in pairs_of(pair):
            same(safe_get_full_grad(param), plain.grad, "gradient")
        pair.engine.step()
        pair.twin_step()
        assert all(safe_get_full_grad(param) is None for param in pair.model.parameters())
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("where", ["cpu", "nvme"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_left_the_device_are_read_before_the_step(run_ranks, tmp_path: Path, stage, where) -> None:
    section = {"offload_optimizer": {"device": where, "nvme_path": str(tmp_path)}}
    run_ranks(reading_from_a_host_of_its_own, 2, stage, section)


def locally(stage: int) -> int:
    from craken.zero import (
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
    )

    pair = Pair(stage)
    assert all(safe_get_local_grad(param) is None for param in pair.model.parameters())
    pair.step_both(0)
    kept = 0
    for param, plain in pairs_of(pair):
        part = safe_get_local_fp32_param(param)
        kept += part.numel()
        safe_set_local_fp32_param(param, part * 0.5)
        plain.data.mul_(0.5)
        state = safe_get_local_optimizer_state(param, "exp_avg")
        if state is not None:
            safe_set_local_optimizer_state(param, state * 2, "exp_avg")
        pair.twin_optimizer.state[plain]["exp_avg"].mul_(2)
    pair.assert_same_weights()
    backward_both(pair, 1)
    for param, plain in pairs_of(pair):
        safe_set_local_grad(param, safe_get_local_grad(param) * 3)
        plain.grad.mul_(3)
    pair.engine.step()
    pair.twin_step()
    pair.assert_same_weights()
    pair.close()
    return kept


@stages
def test_a_rank_reads_and_writes_its_own_part(run_ranks, stage) -> None:
    kept = run_ranks(locally, 2, stage)
    assert kept == [70, 70] if stage == 0 else sum(kept) == 70


def in_half_precision(stage: int) -> None:
    from craken.zero import safe_get_full_fp32_param, safe_get_full_grad, safe_set_full_fp32_param

    config = {"fp16": {"enabled": True, "loss_scale": 128.0}}
    pair = Pair(stage, config=config)
    exact = torch.full((5, 6), 1.0 + 2.0**-16)
    weight = pair.model.left.weight
    safe_set_full_fp32_param(weight, exact)
    assert torch.equal(safe_get_full_fp32_param(weight), exact), "the master was rounded"
    assert value(weight).unique().tolist() == [1.0]
    pair.twin.left.weight.data.copy_(exact)
    pair.engine.backward(error(pair.engine(inputs(0, pair.rank).half())))
    pair.twin_backward(0)
    got = safe_get_full_grad(weight)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, pair.twin.left.weight.grad, rtol=5e-3, atol=1e-3)  # the loss scale is divided out
    pair.engine.step()
    pair.close()


@stages
def test_masters_keep_their_precision_and_gradients_lose_the_loss_scale(run_ranks, stage) -> None:
    run_ranks(in_half_precision, 2, stage)


def refusals() -> None:
    from craken.zero import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_local_grad,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
    )

    model = two_paths()
    model.right.bias.requires_grad_(False)
    pair = Pair(3, model)
    for stranger in (model.right.bias, nn.Parameter(torch.ones(2)), torch.ones(2)):
        assert (
            safe_get_full_fp32_param(stranger) is safe_get_full_grad(stranger) is safe_get_local_grad(stranger) is None
        )
    weight = model.left.weight
    with pytest.raises(ValueError, match="no engine trains this parameter"):
        safe_set_full_fp32_param(model.right.bias, torch.ones(5))
    with pytest.raises(ValueError, match=r"shape \(5, 6\)"):
        safe_set_full_fp32_param(weight, torch.ones(30))
    with pytest.raises(RuntimeError, match="no gradient to set"):
        safe_set_full_grad(weight, torch.ones(5, 6))
    with pytest.raises(ValueError, match="keeps"):
        safe_set_local_fp32_param(weight, torch.ones(31))
    if pair.rank == 0:  # the weight's first part is there
        with pytest.raises(ValueError, match="no state 'exp_avg'"):
            safe_set_full_optimizer_state(weight, torch.ones(5, 6), "exp_avg")
    pair.close()


def test_what_no_engine_trains_has_nothing_to_read(run_ranks) -> None:
    run_ranks(refusals, 2)
