"""Adapters are merged into the weights under every stage, by PEFT's own calls, and taken out again."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.clients.adapters import LR, adapted, logits_of, loss_of, plain_losses, trained
from tests.clients.clients_common import ds_config, whole_weights

pytest.importorskip("peft", reason="needs peft (the hf extra)")
pytestmark = pytest.mark.clients


def train(model: Any, config: dict[str, Any], num_steps: int) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained(model), lr=LR), config=config)
    for step in range(num_steps):
        engine.backward(loss_of(engine, step, dist.get_rank()))
        engine.step()
    return engine


def merge_at_all_stages(method: str, folder: str) -> None:
    from craken.zero import GatheredParameters

    twin = adapted(method)
    plain_losses(twin, 2, dist.get_world_size())
    before = logits_of(twin)
    twin.merge_adapter()
    base = twin.state_dict()
    key = next(name for name in base if name.endswith("base_layer.weight"))
    assert (base[key] - adapted(method).state_dict()[key]).abs().max() > 1e-4, "merging changes nothing"
    for stage, device in [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (3, "cpu"), (3, "nvme")]:
        model, config = adapted(method), ds_config(stage)
        if device != "none":
            where = {"device": device, "nvme_path": f"{folder}/.swap"}
            config["zero_optimization"] |= {"offload_param": where, "offload_optimizer": where}
        engine = train(model, config, 2)
        for safe_merge in (False, True):
            model.merge_adapter(safe_merge=safe_merge)
            with GatheredParameters(model.parameters()):
                torch.testing.assert_close(model.state_dict()[key], base[key], rtol=0, atol=1e-6)
            torch.testing.assert_close(logits_of(engine), before, rtol=0, atol=1e-5)
            model.unmerge_adapter()
            torch.testing.assert_close(logits_of(engine), before, rtol=0, atol=1e-5)
        merged = model.merge_and_unload(safe_merge=(stage, device) in ((1, "none"), (3, "none")))
        torch.testing.assert_close(logits_of(merged), before, rtol=0, atol=1e-5)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        with GatheredParameters(merged.parameters()):
            if dist.get_rank() == 0:
                merged.save_pretrained(f"{folder}/{stage} {device}")
        engine.destroy()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_models_answer_as_the_adapted_ones(run_ranks, tmp_path: Path, method) -> None:
    from transformers import AutoModelForCausalLM

    run_ranks(merge_at_all_stages, 2, method, str(tmp_path), timeout_s=150.0)
    folders = sorted(tmp_path.glob("[0-9]*"))
    logits = [logits_of(AutoModelForCausalLM.from_pretrained(folder).eval()) for folder in folders]
    assert len(logits) == 6
    for of_stage in logits[1:]:
        torch.testing.assert_close(of_stage, logits[0], rtol=0, atol=1e-5)


def merge_in_bf16() -> tuple[float, float]:
    """Merge at stage 3 in bf16, where frozen weights have no master copy; returns how far logits went.

    And how far they go without the adapter.
    """
    config = ds_config(3, bf16={"enabled": True})
    model = adapted("lora")
    engine = train(model, config, 2)
    before = logits_of(engine)
    with model.disable_adapter():
        without = (logits_of(engine) - before).abs().max().item()
    model.merge_adapter()
    distance = (logits_of(engine) - before).abs().max().item()
    loss = loss_of(engine, 3, dist.get_rank())
    assert loss.isfinite()
    engine.destroy()
    return distance, without


def test_merging_in_bf16_costs_its_rounding(run_ranks) -> None:
    for distance, without in run_ranks(merge_in_bf16, 2, timeout_s=120.0):
        assert distance < 0.02
        assert distance < 0.1 * without


def merge_inside_of_blocks() -> None:
    from craken import log
    from craken.zero import GatheredParameters

    model = adapted("lora")
    engine = train(model, ds_config(3), 1)
    before = logits_of(engine)
    weights = whole_weights(model)

    def warnings_of(modifier_rank: int | None, *changes: Callable[[], None]) -> int:
        log._said.clear()
        block = GatheredParameters(model.parameters(), modifier_rank=modifier_rank)
        with contextlib.redirect_stderr(io.StringIO()) as told, block:
            for change in changes:
                change()
        return told.getvalue().count("what that changed is lost")

    once = 1 if dist.get_rank() == 0 else 0  # rank 0 speaks
    # as TRL does, which hands out the merged weights in between
    assert warnings_of(None, model.merge_adapter, model.unmerge_adapter) == 0
    for name, weight in whole_weights(model).items():
        assert torch.equal(weight, weights[name]), f"{name} has drifted"
    assert warnings_of(0, model.merge_adapter) == 0
    torch.testing.assert_close(logits_of(engine), before, rtol=0, atol=1e-5)
    assert warnings_of(None, model.unmerge_adapter, model.merge_adapter) == 0
    assert warnings_of(None, model.unmerge_adapter) == once
    assert (logits_of(engine) - before).abs().max() > 1e-3, "adapters are in the weights and beside them"
    assert warnings_of(None, model.merge_adapter) == once
    engine.destroy()


def test_what_is_merged_in_a_block_without_modifier_is_lost_and_said_to_be(run_ranks) -> None:
    run_ranks(merge_inside_of_blocks, 2, timeout_s=120.0)
