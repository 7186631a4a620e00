"""The engine's side of the comparison; runs on every rank of a pool."""

from __future__ import annotations

import torch.distributed as dist

from tests.parity.case import Case, Run
from tests.parity.model import batch, tiny_gpt
from tests.parity.plain import weights_of


def train_with_engine(case: Case, stage: int) -> Run:
    """Train one case under one stage; the losses are this rank's own."""
    import craken

    model, run = tiny_gpt(case.traits), Run()
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=case.config(stage))
    rank = dist.get_rank()  # on CUDA the engine brings the world up
    for step in range(case.steps):
        total = 0.0
        for micro in range(case.accumulation):
            loss = engine(batch(step, micro, rank))
            engine.backward(loss)
            engine.step()
            total += loss.item() / case.accumulation
        engine.check_integrity()
        run.losses.append(total)
        norm = engine.get_global_grad_norm()
        run.norms.append(float("nan") if norm is None else float(norm))
    run.weights = weights_of(model)
    engine.destroy()
    return run


def train_stages(case: Case, stages: list[int]) -> dict[int, Run]:
    """Train one case under several stages in turn, in one world."""
    return {stage: train_with_engine(case, stage) for stage in stages}
