"""Stage 3 in fewer bits (ZeRO++): how near it stays, and what it sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parity.case import Case
from tests.parity.mesh_run import HPZ, MICS, PLAIN_TRAITS, PSI, Trained, flat, runs_of, train, train_each
from tests.parity.model import Traits
from tests.parity.side_by_side import Pair, inputs
from tests.parity.test_losses import assert_ranks_agree, mean_losses

SCALES = 4 / 256  # bytes an element of a quantised message
QUANTISED = [
    {"zero_quantized_weights": True},
    {"zero_quantized_gradients": True},
    {"zero_quantized_weights": True, "zero_quantized_gradients": True, **HPZ},
    {"zero_quantized_weights": True, "zero_quantized_gradients": True, **MICS},
    {"zero_quantized_gradients": True, "zeropp_loco_param": {"err_beta": 0.2, "reset_T": 16}, **HPZ},
]
TOLERANCE = 0.005  # of the loss, over twenty steps


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quantised_runs_stay_near_the_exact_one(run_ranks, dtype) -> None:
    case = Case(dtype, 4, 2, clip=0.5, steps=20)
    by_rank = run_ranks(train_each, 4, case, [{}, *QUANTISED], timeout_s=240)  # six runs
    exact = mean_losses(runs_of(by_rank, 0))
    assert exact[-1] < 0.95 * exact[0]
    for which, zero in enumerate(QUANTISED, start=1):
        runs = runs_of(by_rank, which)
        worst = ((mean_losses(runs) - exact).abs() / exact).max().item()
        assert 0 < worst <= TOLERANCE, f"{zero}: losses differ by {worst:.1e} relative"
        assert_ranks_agree(runs)
        for trained in by_rank:
            assert all(map(torch.equal, trained[which].seen, by_rank[0][which].seen)), f"{zero}: forwards differ"


def on_two_nodes(case: Case, zero: dict[str, Any]) -> Trained:
    import os

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return train(case, zero)


def test_quantised_traffic_takes_a_half_and_a_quarter_of_bf16(run_ranks) -> None:
    case = Case("bf16", 4, 1, steps=3, traits=PLAIN_TRAITS)
    zero = {"zero_quantized_weights": True, "zero_quantized_gradients": True}
    for trained in run_ranks(on_two_nodes, 4, case, zero):
        events = flat(trained.last_step)
        num_bytes: Counter[tuple[str, str]] = Counter()
        for event in events:
            assert event.dtype == "uint8"
            num_bytes[event.op, event.axis] += event.num_bytes
        expected = {
            ("all_gather", "dp"): 2 * PSI * 3 / 4,
            ("all_to_all", "dp.inner"): PSI / 2 * 1 / 2,
            ("all_to_all", "dp.outer"): PSI / 2 * 1 / 4,
        }
        assert set(num_bytes) == set(expected)
        # groups are small here: shards are padded to 32 elements, scales stand for 256 or fewer, and begin at 16 bytes
        padding = (32 + 16 + 4) * 4
        for key, floor in expected.items():
            messages = sum((event.op, event.axis) == key for event in events)
            assert floor * (1 + SCALES) <= num_bytes[key] <= floor * (1 + 2 * SCALES) + padding * messages


def test_one_node_takes_one_hop(run_ranks) -> None:
    case = Case("bf16", 2, 1, steps=1, traits=PLAIN_TRAITS)
    for trained in run_ranks(train, 2, case, {"zero_quantized_gradients": True}):
        assert {event.axis for event in trained.last_step if event.op == "all_to_all"} == {"dp.inner"}


def frozen_only(case: Case) -> set[tuple[str, str]]:
    trained = train(case, {"zero_quantized_nontrainable_weights": True})
    return {
        ("frozen" if event.label.startswith("position") else "trained", event.dtype)
        for event in trained.last_step
        if event.op == "all_gather"
    }


def test_frozen_weights_alone_may_be_quantised(run_ranks) -> None:
    case = Case("bf16", 2, 1, steps=1, traits=Traits(has_frozen=True, has_unused=False))
    assert run_ranks(frozen_only, 2, case) == [{("frozen", "uint8"), ("trained", "bfloat16")}] * 2


def values_are_exact() -> None:
    pair = Pair(3, config={"zero_optimization": {"stage": 3, "zero_quantized_weights": True, "reduce_bucket_size": 20}})
    pair.engine(inputs(0, pair.rank))  # gathers in 8 bits
    pair.assert_same_weights(atol=0)
    pair.close()


def test_users_read_what_the_shards_hold(run_ranks) -> None:
    run_ranks(values_are_exact, 2)


def overflow() -> list[int]:
    import craken

    model = torch.nn.Linear(64, 64)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1},
        "zero_optimization": {
            "stage": 3,
            "zero_quantized_gradients": True,
            "zero_hpz_partition_size": 2,
            "stage3_param_persistence_threshold": 0,
        },
    }
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    skipped = []
    for step in range(3):
        x = torch.ones(1, 64, dtype=torch.float16)
        if step == 1 and dist.get_rank() == 2:
            x[0, 5] = float("inf")
        engine.backward(engine(x).float().mean())
        engine.step()
        skipped.append(engine.skipped_steps)
    engine.destroy()
    return skipped


def test_an_overflow_on_one_rank_skips_the_step_on_all(run_ranks) -> None:
    assert run_ranks(overflow, 4) == [[0, 1, 1]] * 4
