"""LoRA on bf16, 8-bit and 4-bit (nf4, quantised twice) weights, under stages 1, 2 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.clients.adapters import (
    LR,
    adapted,
    logits_of,
    loss_of,
    mean_over_ranks,
    plain_losses,
    trained,
)
from tests.clients.clients_common import assert_shares_are_kept, device, ds_config, full_bytes, tiny_llama

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (the hf extra)")
pytest.importorskip("peft", reason="needs peft (the hf extra)")
pytestmark = pytest.mark.clients

NUM_STEPS = 4
# 8-bit layers quantise activations too: a last bit of difference in one can move it by a 127th
FURTHEST = {"none": 1e-5, "8-bit": 1e-4, "4-bit": 1e-5}
FURTHEST_IN_BF16 = 5e-3
if torch.cuda.is_available():  # 8-bit layers compute in fp16 there, and kernels may add up in another order each time
    FURTHEST["8-bit"] = FURTHEST_IN_BF16 = 2e-2


def quantised(folder: str, bits: str, dtype: torch.dtype) -> Any:
    """Load a base model as users do, and put LoRA on it."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    how = {
        "none": None,
        "8-bit": BitsAndBytesConfig(load_in_8bit=True),
        "4-bit": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        ),
    }[bits]
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=dtype)
    if how is not None:
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return adapted("lora", base).train()


def packed_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if type(p).__name__ in ("Params4bit", "Int8Params")}


def packed_bytes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the quantised weights, byte by byte."""
    from craken.zero import GatheredParameters

    with GatheredParameters(model.parameters()):
        return {name: param.data.view(torch.uint8).clone() for name, param in packed_of(model).items()}


def train_a_cell(folder: str, bits: str, stage: int) -> None:
    for dtype, furthest in ((torch.float32, FURTHEST[bits]), (torch.bfloat16, FURTHEST_IN_BF16)):
        check_cell(folder, bits, stage, dtype, furthest)


def check_cell(
    folder: str, bits: str, stage: int, dtype: torch.dtype, furthest: float, offload: dict[str, str] | None = None
) -> None:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    twin = quantised(folder, bits, dtype).to(device())
    expected = plain_losses(twin, NUM_STEPS, dist.get_world_size())
    config = ds_config(stage, bf16={"enabled": dtype is torch.bfloat16})
    if offload is not None:
        config["zero_optimization"] |= {"offload_param": offload, "offload_optimizer": offload}
    alive = HfDeepSpeedConfig(config)
    model = quantised(folder, bits, dtype)
    before = packed_bytes(model)
    assert len(before) == (0 if bits == "none" else 14)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained(model), lr=LR), config=config)
    losses = []
    for step in range(NUM_STEPS):
        loss = loss_of(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_ranks(loss))
        logits_of(model.eval())  # evaluation between steps leaves weights as they are
        model.train()
    torch.testing.assert_close(losses, expected, rtol=0, atol=furthest)
    for name, packed in packed_bytes(model).items():
        assert torch.equal(packed, before[name]), f"{name} was cast or moved"
    check_kept_bytes(model, before, bits, stage)
    in_files = engine.memory_ledger()["nvme"]
    if offload is not None and offload["device"] == "nvme":
        weight_bytes = sum(param.ds_tensor.nbytes for param in model.parameters())
        state_bytes = sum(2 * 4 * param.ds_tensor.numel() for param in trained(model))
        assert in_files == pytest.approx(weight_bytes + state_bytes, rel=0.01), "weights, and Adam's states of LoRA's"
    else:
        assert in_files == 0
    check_merged(model, twin)
    engine.destroy()
    del alive


def check_kept_bytes(model: torch.nn.Module, packed: dict[str, torch.Tensor], bits: str, stage: int) -> None:
    """At stage 3 every rank keeps a share of the packed bytes; 8-bit weights stay whole."""
    whole = sum(data.numel() for data in packed.values())
    if stage == 3 and bits == "4-bit":
        assert_shares_are_kept(packed_of(model).values())
        assert full_bytes(packed_of(model).values()) == whole
    else:
        assert sum(param.nbytes for param in packed_of(model).values()) == whole


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are the same to the bit; packed weights that wear a floating dtype may look like NaN."""
    return one.dtype is other.dtype and torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8))


def check_merged(model: Any, twin: Any) -> None:
    """Merged, the model is to the bit what plain PyTorch makes of the same weights and adapter."""
    from craken.zero import GatheredParameters
    from craken.zero.building.quantised_layers import keep_from_repacking

    keep_from_repacking(twin)  # the kernels for repacked weights compute in bf16
    with GatheredParameters(model.parameters()):
        for (name, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if name in packed_of(model):
                assert same_bytes(param, other), f"{name} is another one"
            else:
                other.data = param.detach().clone()
    adapted_logits = logits_of(model.eval())
    with model.disable_adapter():
        without = logits_of(model)
    expected, merged = twin.merge_and_unload().eval(), model.merge_and_unload()
    with GatheredParameters(merged.parameters()):
        for (name, param), other in zip(merged.named_parameters(), expected.parameters(), strict=True):
            assert same_bytes(param, other), f"{name} was merged otherwise"
    found = logits_of(merged)
    assert torch.equal(found, logits_of(expected))
    # 4-bit codes are far apart: merged weights that fall between two cost 0.12 of what the adapter does
    assert (found - adapted_logits).norm() < 0.15 * (without - adapted_logits).norm()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=128, intermediate_size=192).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bits", ["none", "8-bit", "4-bit"])
def test_every_cell_trains_and_merges(run_ranks, base: str, bits: str, stage: int) -> None:
    run_ranks(train_a_cell, 2, base, bits, stage, timeout_s=150.0)


@pytest.mark.parametrize("device", ["cpu", "nvme"])
def test_packed_weights_train_and_merge_from_where_they_rest(run_ranks, base: str, tmp_path: Path, device: str) -> None:
    """The losses are those without offload, of plain PyTorch; files hold the packed weights, not only the states."""
    offload = {"device": device, "nvme_path": str(tmp_path)}
    furthest = FURTHEST["4-bit"]
    run_ranks(check_cell, 2, base, "4-bit", 3, torch.float32, furthest, offload, timeout_s=120.0)


# --- resumed ----------------------------------------------------------------------------------------------------------


def save_a_step(folder: str, base: str, stage: int) -> torch.Tensor:
    engine = engine_on(quantised(base, "4-bit", torch.bfloat16), stage)
    engine.backward(loss_of(engine, 0, dist.get_rank()))
    engine.step()
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    logits = logits_of(engine.eval())
    engine.destroy()
    return logits


def load_a_step(folder: str, base: str, stage: int) -> torch.Tensor:
    engine = engine_on(quantised(base, "4-bit", torch.bfloat16), stage)
    path, _ = engine.load_checkpoint(folder, load_module_strict=False)
    assert path is not None
    logits = logits_of(engine.eval())
    engine.destroy()
    return logits


def engine_on(model: Any, stage: int) -> Any:
    import deepspeed

    optimizer = torch.optim.AdamW(trained(model), lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage, bf16={"enabled": True}))[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_are_resumed_on_quantised_weights(run_ranks, base: str, tmp_path: Path, stage: int) -> None:
    saved = run_ranks(save_a_step, 2, str(tmp_path), base, stage, timeout_s=120.0)
    loaded = run_ranks(load_a_step, 2, str(tmp_path), base, stage, timeout_s=120.0)
    assert torch.equal(saved[0], loaded[0])
