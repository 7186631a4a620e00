"""Loops that users write with accelerate train under every stage as they do with plain PyTorch on as many ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.clients.clients_common import (
    Run,
    accelerator_of,
    assert_same,
    fresh_clients,
    plugin_of,
    tiny_llama,
    token_rows,
    whole_weights,
)

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")


def optimizer_of(name: str, params: Any) -> Any:
    if name != "Lion":
        return getattr(torch.optim, name)(params, lr=1e-2)
    from bitsandbytes.optim import Lion32bit

    return Lion32bit(params, lr=1e-3)


def loop(plugin: dict[str, Any] | None, accumulation: int, optimizer_name: str) -> Run:
    with fresh_clients(is_sharded=plugin is not None):
        options = {"gradient_accumulation_steps": accumulation}
        accelerator = accelerator_of(None if plugin is None else plugin_of(**plugin, **options), **options)
        model = tiny_llama()
        optimizer = optimizer_of(optimizer_name, model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        loader = torch.utils.data.DataLoader(token_rows(24), batch_size=2)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        losses, norms = [], []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:  # with DeepSpeed, the step has been taken, and clipped by the config
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(accelerator.gather(loss.detach()).mean().item())
        run = Run(losses, norms, whole_weights(accelerator.unwrap_model(model)))
        accelerator.free_memory()
        return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loop_trains_as_in_plain_pytorch(run_ranks, accumulation, stage) -> None:
    plugin = {"stage": stage, "gradient_clipping": 0.5}
    runs = run_ranks(loop, 2, plugin, accumulation, "AdamW")
    assert_same(runs[0], run_ranks(loop, 2, None, accumulation, "AdamW")[0])


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Adagrad", "Lion"])
@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_whose_states_rest_on_the_host_trains_as_in_plain_pytorch(run_ranks, stage, name) -> None:
    """accelerate puts its DeepSpeedCPU class in the optimizer's place, with arguments that only Adam has."""
    plugin = {"stage": stage, "gradient_clipping": 0.5, "offload_optimizer_device": "cpu"}
    if stage == 3:
        plugin["offload_param_device"] = "cpu"
    runs = run_ranks(loop, 2, plugin, 1, name)
    assert_same(runs[0], run_ranks(loop, 2, None, 1, name)[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_optimizer_of_the_users_own_rests_on_the_host_if_the_file_keeps_it(run_ranks, stage) -> None:
    plugin = {"stage": stage, "gradient_clipping": 0.5, "offload_optimizer_device": "cpu", "keeps_optimizer": True}
    runs = run_ranks(loop, 2, plugin, 1, "SGD")
    assert_same(runs[0], run_ranks(loop, 2, None, 1, "SGD")[0])
