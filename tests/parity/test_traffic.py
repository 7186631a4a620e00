"""Bytes on the wire per step, and the whole list of events: each stage sends what the ZeRO paper says and no more.

Elements sent by a rank in a step of g micro-batches, times (N-1)/N: 2 Psi at stages 0 and 1, (g + 1) Psi at stage 2,
3 g Psi at stage 3; plus padding (a shard is a multiple of 32 elements), plus a few scalars for norm and vote.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from tests.parity.case import Case
from tests.parity.model import Traits, batch, tiny_gpt

TRAITS = Traits(has_unused=False, has_frozen=False)
PSI = sum(param.numel() for param in tiny_gpt(TRAITS).parameters())
SHARD_MULTIPLE = 32
SCALAR_BYTES = 4096


@dataclass(frozen=True)
class Sent:
    """One event, as far as it travels between processes."""

    op: str
    label: str
    numel: int
    dtype: str
    sent_numel: int
    num_bytes: int


def one_step(case: Case, stage: int) -> tuple[list[Sent], int]:
    """Return the third step's events and its bytes by the running count; earlier steps settle the order of groups."""
    import craken
    from craken import comm

    model, rank = tiny_gpt(case.traits), dist.get_rank()
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=case.config(stage))
    for step in range(3):
        before = comm.bytes_sent()
        with comm.event_log() as events:
            for micro in range(case.accumulation):
                engine.backward(engine(batch(step, micro, rank)))
                engine.step()
    sent = comm.bytes_sent() - before
    engine.destroy()
    return [
        Sent(e.op, e.label, e.numel, str(e.dtype).removeprefix("torch."), e.sent_numel, e.bytes_sent) for e in events
    ], sent


def expected_elements(stage: int, accumulation: int, world_size: int) -> float:
    times = {0: 2, 1: 2, 2: accumulation + 1, 3: 3 * accumulation}[stage]
    return times * PSI * (world_size - 1) / world_size


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_sends_what_the_paper_says(run_ranks, stage, world_size, accumulation, dtype) -> None:
    case = Case(dtype, world_size, accumulation, clip=1.0, traits=TRAITS)
    floor = expected_elements(stage, accumulation, world_size)
    for events, counted in run_ranks(one_step, world_size, case, stage):
        assert counted == sum(event.num_bytes for event in events)
        flat = [event for event in events if event.op in ("reduce_scatter", "all_gather")]
        padding = len(flat) * SHARD_MULTIPLE * (world_size - 1)
        assert floor <= sum(event.sent_numel for event in flat) <= floor + padding
        assert 0 <= counted - sum(event.num_bytes for event in flat) <= SCALAR_BYTES
        assert {(event.op, event.dtype) for event in flat} == {
            ("reduce_scatter", travelling(dtype)),
            # gradients accumulated in fp32 are gathered as such: ranks that step alike must have the same sums
            ("all_gather", "float32" if stage == 0 and accumulation > 1 else travelling(dtype)),
        }


def travelling(dtype: str) -> str:
    return "float32" if dtype == "fp32" else "bfloat16"


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_event_list_follows_from_the_stage(run_ranks, stage, accumulation) -> None:
    case = Case(world_size=2, accumulation=accumulation, traits=TRAITS)
    (events, _), (others, _) = run_ranks(one_step, 2, case, stage)
    assert [(e.op, e.label, e.numel) for e in events] == [(e.op, e.label, e.numel) for e in others]
    flat = [(event.op, event.label) for event in events if event.op in ("reduce_scatter", "all_gather")]
    reduced = [label for op, label in flat if op == "reduce_scatter"]
    gathered = [label.removesuffix(" (gradients)") for op, label in flat if op == "all_gather"]
    groups = set(reduced)
    assert len(groups) >= 3, "the tiny model should have several shard groups"
    rounds = accumulation if stage == 2 else 1
    assert len(reduced) == rounds * len(groups)
    assert all(set(reduced[i : i + len(groups)]) == groups for i in range(0, len(reduced), len(groups)))
    assert sorted(gathered) == sorted(groups)
    if stage:
        # every gradient has arrived before the first updated weight leaves
        ops = [op for op, _ in flat]
        assert ops == ["reduce_scatter"] * len(reduced) + ["all_gather"] * len(gathered)
    rest = [event.op for event in events if event.op not in ("reduce_scatter", "all_gather")]
    assert rest == ["all_reduce"], f"expected one sum of norm and votes beside, got {rest}"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_stage_3_gathers_each_group_once_a_forward_and_once_a_backward(run_ranks, accumulation) -> None:
    case = Case(world_size=2, accumulation=accumulation, traits=TRAITS)
    (events, _), (others, _) = run_ranks(one_step, 2, case, 3)
    assert [(e.op, e.label, e.numel) for e in events] == [(e.op, e.label, e.numel) for e in others]
    reduced = [event.label for event in events if event.op == "reduce_scatter"]
    gathered = [event.label.removesuffix(" (weights)") for event in events if event.op == "all_gather"]
    groups = set(reduced)
    assert len(groups) >= 3, "the tiny model should have several shard groups"
    assert sorted(reduced) == sorted([*groups] * accumulation)
    assert sorted(gathered) == sorted([*groups] * 2 * accumulation)
    rest = [event.op for event in events if event.op not in ("reduce_scatter", "all_gather")]
    assert rest == ["all_reduce"], f"expected one sum of norm and votes beside, got {rest}"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_parameters_and_evaluation_send_nothing(run_ranks, stage) -> None:
    for evaluation_bytes, events in run_ranks(step_with_frozen_blocks, 2, stage):
        assert evaluation_bytes == 0
        trained = 64 * 16  # the embedding alone
        sent = sum(event.num_bytes for event in events if event.op in ("reduce_scatter", "all_gather")) // 4
        assert trained <= sent <= trained + 2 * SHARD_MULTIPLE * len(events)


def step_with_frozen_blocks(stage: int) -> tuple[int, list[Sent]]:
    import craken
    from craken import comm

    case, rank = Case(traits=TRAITS), dist.get_rank()
    model = tiny_gpt(TRAITS).requires_grad_(False)
    model.embed.weight.requires_grad_(True)
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=case.config(stage))
    before = comm.bytes_sent()
    with torch.no_grad():
        engine.eval()
        engine(batch(0, 0, rank))
        engine.train()
    evaluation_bytes = comm.bytes_sent() - before
    with comm.event_log() as events:
        engine.backward(engine(batch(0, 0, rank)))
        engine.step()
    engine.destroy()
    return evaluation_bytes, [Sent(e.op, e.label, e.numel, str(e.dtype), e.sent_numel, e.bytes_sent) for e in events]
