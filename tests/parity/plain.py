"""What every stage must reproduce: single-process loops of plain PyTorch, nothing sharded, nothing sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from tests.parity.case import DECAY, DTYPES, LEARNING_RATE, Case, Run
from tests.parity.model import TinyGPT, batch, tiny_gpt


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights, by name; collective where an engine keeps them as shards."""
    from craken.zero import GatheredParameters

    with GatheredParameters(model.parameters()):
        return _copies(model)


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def train_on_concatenated_batch(case: Case) -> Run:
    """fp32: one process that sees in each micro-batch what all ranks see."""
    model, run = tiny_gpt(case.traits).to(case.device), Run()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=DECAY, fused=True)
    for step in range(case.steps):
        total = 0.0
        for micro in range(case.accumulation):
            loss = model(torch.cat([batch(step, micro, rank) for rank in range(case.world_size)]))
            (loss / case.accumulation).backward()
            total += loss.item() / case.accumulation
        norm = nn.utils.clip_grad_norm_(trained, case.clip or float("inf"))
        run.losses.append(total)
        run.norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    run.weights = weights_of(model)
    return run


def train_rank_by_rank(case: Case) -> Run:
    """Any dtype: each rank's gradients apart, then summed in fp32, with fp32 masters and a static loss scale.

    In fp32 on 2 ranks this takes every sum in the order in which stages 0 and 1 take it, so weights agree to the bit.
    """
    dtype, model, run = DTYPES[case.dtype], tiny_gpt(case.traits).to(case.device), Run()
    trained = [param for param in model.parameters() if param.requires_grad]
    masters = [nn.Parameter(param.detach().clone()) for param in trained]
    for param in model.parameters():
        param.data = param.data.to(dtype)
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=DECAY, fused=True)
    divisor = case.world_size * case.accumulation * case.loss_scale
    for step in range(case.steps):
        run.losses.append(0.0)
        sums: list[Tensor | None] = [None] * len(trained)
        for rank in range(case.world_size):
            loss, grads = _accumulate(model, trained, case, (step, rank))
            run.losses[-1] += loss / case.world_size
            sums = [_add(total, grad) for total, grad in zip(sums, grads, strict=True)]
        for master, total in zip(masters, sums, strict=True):
            master.grad = None if total is None else total / divisor
        run.norms.append(nn.utils.clip_grad_norm_(masters, case.clip or float("inf")).item())
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(trained, masters, strict=True):
                param.copy_(master)
    run.weights = weights_of(model)
    return run


def _accumulate(
    model: TinyGPT, trained: list[nn.Parameter], case: Case, where: tuple[int, int]
) -> tuple[float, list[Tensor | None]]:
    """Return one rank's mean loss and its gradients, summed over micro-batches in fp32."""
    step, rank = where
    mean, sums = 0.0, [None] * len(trained)  # type: tuple[float, list[Tensor | None]]
    for micro in range(case.accumulation):
        loss = model(batch(step, micro, rank))
        mean += loss.item() / case.accumulation
        grads = torch.autograd.grad(loss * case.loss_scale, trained, allow_unused=True)
        sums = [_add(total, grad) for total, grad in zip(sums, grads, strict=True)]
    return mean, sums


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return total
    return grad.float() if total is None else total + grad.float()


def dynamic_scales(overflows: Iterable[bool], *, start: float, window: int, hysteresis: int) -> Iterator[float]:
    """Yield the loss scale after each step, written down anew from its description.

    An overflow first uses up `hysteresis - 1` chances, then halves. `window` good steps after a first one (at the start
    or after an overflow) double it and give the chances back, and so does every `window` after that.
    """
    scale, chances, since = start, hysteresis, 0
    for has_overflow in overflows:
        if has_overflow:
            since = 0
            if chances > 1:
                chances -= 1
            else:
                scale = max(scale / 2, 1.0)
        else:
            since += 1
            if since > 1 and (since - 1) % window == 0:
                scale, chances = scale * 2, hysteresis
        yield scale
