"""Stage 3 on links of two speeds (MiCS, hpZ): the numbers of stage 3, and other traffic.

Elements sent by a rank of N in a step of g micro-batches, with an inner axis of s ranks:

                 over dp                    over dp.inner               over dp.outer
    stage 3      3 g Psi (N-1)/N            -                           -
    MiCS         -                          3 g Psi (s-1)/s             2 Psi/s (N/s-1)/(N/s)
    hpZ          (1 + g) Psi (N-1)/N        (2 g - 1) Psi (s-1)/s       -
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.parity.case import Case
from tests.parity.mesh_run import HPZ, MICS, PLAIN_TRAITS, PSI, elements, flat, runs_of, train, train_each
from tests.parity.model import Traits, tiny_gpt
from tests.parity.side_by_side import Pair, error, inputs, two_paths
from tests.parity.test_losses import assert_ranks_agree, mean_losses

# ---- MiCS ----


@pytest.mark.parametrize(
    ("dtype", "accumulation", "persistent", "tolerance"),
    [("fp32", 1, 0, 1e-6), ("fp32", 3, 0, 1e-6), ("fp32", 3, 100, 1e-6), ("bf16", 1, 100, 2e-3), ("bf16", 4, 0, 2e-3)],
)
def test_mics_trains_as_stage_3_does(run_ranks, dtype, accumulation, persistent, tolerance) -> None:
    """A frozen and an unused parameter are in the model; `persistent` puts small parameters into groups kept whole."""
    case = Case(dtype, 4, accumulation, clip=0.5, steps=12, persistent=persistent)
    by_rank = run_ranks(train_each, 4, case, [{}, MICS])
    plain, mics = runs_of(by_rank, 0), runs_of(by_rank, 1)
    torch.testing.assert_close(mean_losses(mics), mean_losses(plain), rtol=tolerance, atol=0)
    torch.testing.assert_close(torch.tensor(mics[0].norms), torch.tensor(plain[0].norms), rtol=10 * tolerance, atol=0)
    assert all(run.norms == mics[0].norms for run in mics)
    assert_ranks_agree(mics)
    for rank in (0, 1):
        for mine, replica in zip(by_rank[rank][1].masters, by_rank[rank + 2][1].masters, strict=True):
            assert torch.equal(mine, replica), "replicas of a shard differ"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_mics_gathers_over_the_shard_axis_and_adds_replicas_once_a_step(run_ranks, accumulation) -> None:
    case = Case(world_size=4, accumulation=accumulation, steps=3, traits=PLAIN_TRAITS)
    for trained in run_ranks(train, 4, case, MICS):
        events = flat(trained.last_step)
        padding = 32 * len(events)
        inner, outer = 3 * accumulation * PSI / 2, 2 * PSI / 2 / 2
        sent = elements(events)
        assert set(sent) == {"dp.inner", "dp.outer"}
        assert inner <= sent["dp.inner"] <= inner + padding
        assert outer <= sent["dp.outer"] <= outer + padding
        assert {event.micro for event in events if event.axis == "dp.outer"} == {accumulation - 1}
        replicas = [event.label for event in events if event.axis == "dp.outer"]
        groups = {event.label for event in events if event.op == "reduce_scatter" and event.axis == "dp.inner"}
        assert Counter(replicas) == {f"{group} (replicas)": 2 for group in groups}  # reduce-scatter and all-gather
        first, last = (
            [i for i, event in enumerate(events) if event.axis == axis and event.op == "reduce_scatter"][end]
            for axis, end in (("dp.outer", 0), ("dp.inner", -1))
        )
        assert first < last, "the replicas' sums do not overlap the backward"
        votes = [event for event in trained.last_step if event.op == "all_reduce"]
        assert {event.axis for event in votes} == {"dp"}


def several_backwards() -> None:
    zero = {"stage": 3, "reduce_bucket_size": 20, "stage3_param_persistence_threshold": 0, **MICS}
    pair = Pair(3, accumulation=2, config={"zero_optimization": zero})
    for step in range(3):
        for micro in range(2):
            at = 10 * step + micro
            output = pair.engine(inputs(at, pair.rank))
            pair.engine.backward(error(output), retain_graph=True)
            pair.engine.backward(error(2 * output))
            error(pair.engine(inputs(at + 5, pair.rank), right=False)).backward()
            pair.engine.step()
            pair.engine.check_integrity()
            pair.twin_backward_of(
                lambda rank, at=at: (
                    error(pair.twin(inputs(at, rank)))
                    + error(2 * pair.twin(inputs(at, rank)))
                    + error(pair.twin(inputs(at + 5, rank), right=False))
                ),
                0.5,
            )
        pair.twin_step()
        pair.assert_same_weights()
    pair.close()


def test_mics_adds_up_what_several_backwards_bring(run_ranks) -> None:
    run_ranks(several_backwards, 4)


def edited() -> None:
    from craken.zero import GatheredParameters

    pair = Pair(3, config={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **MICS}})
    weight = pair.model.left.weight
    with GatheredParameters(weight, modifier_rank=3), torch.no_grad():
        weight.fill_(float(pair.rank))
    with torch.no_grad():
        pair.twin.left.weight.fill_(3.0)
    pair.step_both(0)
    pair.assert_same_weights()
    pair.close()


def test_an_edit_reaches_all_replicas(run_ranks) -> None:
    run_ranks(edited, 4)


def built_in_shards() -> None:
    """Parameters that are built as shards over all ranks move to the shard axis of the engine that takes them."""
    import craken

    config = Case(world_size=4).config(3)
    config["zero_optimization"].update(MICS)
    with craken.Init(config_dict_or_path=config):
        model = two_paths()
    assert all(param.shape == (0,) for param in model.parameters())
    pair = Pair(3, model, config={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **MICS}})
    for step in range(2):
        pair.step_both(step)
        pair.assert_same_weights()
    assert {group.layout.world_size for group in pair.engine.groups} == {2}
    pair.close()


def test_a_model_built_under_init_trains_with_mics(run_ranks) -> None:
    run_ranks(built_in_shards, 4)


# ---- hpZ ----


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_second_copies_change_no_bit(run_ranks, dtype, accumulation) -> None:
    case = Case(dtype, 4, accumulation, clip=0.5, steps=8)
    by_rank = run_ranks(train_each, 4, case, [{}, HPZ, {"zero_hpz_partition_size": 4}])
    for trained in by_rank:
        for other in trained[1:]:
            assert other.run.losses == trained[0].run.losses
            for name, weight in trained[0].run.weights.items():
                assert torch.equal(other.run.weights[name], weight), name


@pytest.mark.parametrize("accumulation", [1, 3])
def test_all_gathers_but_the_first_of_a_step_stay_inside(run_ranks, accumulation) -> None:
    case = Case(world_size=4, accumulation=accumulation, steps=3, traits=PLAIN_TRAITS)
    for trained in run_ranks(train, 4, case, HPZ):
        events = flat(trained.last_step)
        padding = 4 * 32 * len(events)
        dp, inner = (1 + accumulation) * PSI * 3 / 4, (2 * accumulation - 1) * PSI / 2
        sent = elements(events)
        assert set(sent) == {"dp", "dp.inner"}
        assert dp <= sent["dp"] <= dp + padding
        assert inner <= sent["dp.inner"] <= inner + padding
        for label in {event.label for event in events if event.op == "all_gather"}:
            gathers = [event.axis for event in events if event.label == label]
            assert gathers == ["dp"] + ["dp.inner"] * (2 * accumulation - 1)


def test_frozen_weights_cross_once_in_a_run(run_ranks) -> None:
    case = Case(world_size=4, steps=3, traits=Traits(has_frozen=True, has_unused=False))
    for trained in run_ranks(train, 4, case, HPZ):
        frozen = [event.axis for event in trained.last_step if event.label.startswith("position")]
        assert frozen == ["dp.inner", "dp.inner"]


def bytes_of_second_copies(partition_size: int) -> int:
    import craken
    from craken.zero import mapped_bytes

    before = mapped_bytes()
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(4)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "zero_hpz_partition_size": partition_size,
            "stage3_param_persistence_threshold": 0,
        },
    }
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 512, dtype=torch.bfloat16)).square().mean())
        engine.step()
    held = mapped_bytes() - before
    engine.destroy()
    return held


@pytest.mark.parametrize("partition_size", [2, 4])
def test_a_second_copy_takes_its_share_of_the_compute_dtype(run_ranks, partition_size) -> None:
    weights = 4 * 512 * 512 * 2  # bytes in bf16
    plain = run_ranks(bytes_of_second_copies, 4, 1)
    for with_copies, without in zip(run_ranks(bytes_of_second_copies, 4, partition_size), plain, strict=True):
        assert with_copies - without == pytest.approx(weights / partition_size, rel=0.03)


# ---- sizes ----


def refused(zero: dict[str, Any]) -> str:
    import craken

    config = Case(world_size=4).config(3)
    config["zero_optimization"].update(zero)
    with pytest.raises(ValueError, match="does not divide") as caught:
        craken.initialize(model=tiny_gpt(), config=config)
    return str(caught.value)


@pytest.mark.parametrize("key", ["mics_shard_size", "zero_hpz_partition_size"])
def test_a_size_that_does_not_divide_the_ranks_is_refused_on_all(run_ranks, key) -> None:
    for message in run_ranks(refused, 4, {key: 3}):
        assert message.startswith(f"zero_optimization.{key} is 3, which does not divide the 4 data-parallel ranks")
