"""Loops that users write with accelerate train under every stage as they do with plain PyTorch on as many ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.clients.clients_common import Run, assert_same, fresh_clients, tiny_llama, token_rows, whole_weights

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")


def accelerator_of(plugin: Any = None, **options: Any) -> Any:
    """Return an Accelerator on gloo: DeepSpeed's with a plugin, torch's DDP without one."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if plugin is None:
        return Accelerator(cpu=True, **options)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **options)


def loop(plugin: dict[str, Any] | None, accumulation: int, optimizer_name: str) -> Run:
    from accelerate.utils import DeepSpeedPlugin

    with fresh_clients(is_sharded=plugin is not None):
        options = {"gradient_accumulation_steps": accumulation}
        accelerator = accelerator_of(None if plugin is None else DeepSpeedPlugin(**plugin, **options), **options)
        model = tiny_llama()
        optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = torch.utils.data.DataLoader(token_rows(24), batch_size=2)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        losses, norms = [], []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                norm = None
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(accelerator.gather(loss.detach()).mean().item())
                if norm is not None:
                    norms.append(float(norm))
        run = Run(losses, norms, whole_weights(accelerator.unwrap_model(model)))
        accelerator.free_memory()
        accelerator.end_training()
        return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loop_trains_as_in_plain_pytorch(run_ranks, accumulation, stage) -> None:
    plugin = {"zero_stage": stage, "gradient_clipping": 0.5}
    runs = run_ranks(loop, 2, plugin, accumulation, "AdamW")
    assert_same(runs[0], run_ranks(loop, 2, None, accumulation, "AdamW")[0])
