"""Training under a mesh and a transport, and all that can be asked of it afterwards; runs on every rank of a pool."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from tests.parity.case import Case, Run
from tests.parity.model import Traits, batch, tiny_gpt
from tests.parity.plain import weights_of

PLAIN_TRAITS = Traits(has_unused=False, has_frozen=False)
PSI = sum(param.numel() for param in tiny_gpt(PLAIN_TRAITS).parameters())
MICS, HPZ = {"mics_shard_size": 2}, {"zero_hpz_partition_size": 2}


class Sent(NamedTuple):
    """One event of a step's third time, in the micro-batch it was issued in."""

    micro: int
    op: str
    label: str
    axis: str
    dtype: str
    sent_numel: int
    num_bytes: int


class Trained(NamedTuple):
    run: Run
    last_step: list[Sent]
    masters: list[Tensor]  # this rank's shards at the end
    seen: list[Tensor]  # the weights of the first block's first layer, as each forward of the last step saw them


def train(case: Case, zero: dict[str, Any]) -> Trained:
    import craken
    from craken import comm

    model, run = tiny_gpt(case.traits), Run()
    config = case.config(3)
    config["zero_optimization"].update(zero)
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config)
    rank = dist.get_rank()  # on CUDA the engine brings the world up
    seen: list[Tensor] = []
    sent: list[Sent] = []
    qkv = model.blocks[0].qkv
    qkv.register_forward_hook(lambda module, inputs, output: seen.append(module.weight.detach().clone()))
    for step in range(case.steps):
        total, sent, seen[:] = 0.0, [], []
        for micro in range(case.accumulation):
            with comm.event_log() as events:
                loss = engine(batch(step, micro, rank))
                engine.backward(loss)
                engine.step()
            total += loss.item() / case.accumulation
            sent += [Sent(micro, e.op, e.label, e.axis, str(e.dtype)[6:], e.sent_numel, e.bytes_sent) for e in events]
        engine.check_integrity()
        run.losses.append(total)
        norm = engine.get_global_grad_norm()
        run.norms.append(float("nan") if norm is None else norm)
    run.weights = weights_of(model)
    masters = [group.master.clone() for group in engine.groups]
    engine.destroy()
    return Trained(run, sent, masters, seen)


def train_each(case: Case, zeros: list[dict[str, Any]]) -> list[Trained]:
    return [train(case, zero) for zero in zeros]


def flat(events: list[Sent]) -> list[Sent]:
    """Return the traffic of weights and gradients, without that of norms and votes."""
    return [event for event in events if event.op != "all_reduce"]


def elements(events: list[Sent]) -> Counter[str]:
    """Return the elements sent, by axis."""
    counts: Counter[str] = Counter()
    for event in flat(events):
        counts[event.axis] += event.sent_numel
    return counts


def runs_of(by_rank: list[list[Trained]], which: int) -> list[Run]:
    return [trained[which].run for trained in by_rank]
