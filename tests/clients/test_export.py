"""Exported models load with `from_pretrained` and answer as the engine's module did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from craken import cli
from tests.clients.clients_common import tiny_config, tiny_llama

transformers = pytest.importorskip("transformers", reason="needs transformers (the hf extra)")
pytestmark = pytest.mark.clients

TOKENS = torch.arange(16).view(2, 8)
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def train_and_save(folder: str, precision: str, is_tied: bool) -> torch.Tensor:
    """Save under stage 3 after a step, as `craken train` lays it out; return the logits of the trained module."""
    import craken

    model = tiny_llama(**SIZES, tie_word_embeddings=is_tied)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = craken.initialize(model=model, config=config)
    engine.backward(engine(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss)
    engine.step()
    engine.save_checkpoint(f"{folder}/checkpoints", tag="step1")
    with torch.no_grad():
        logits = engine.eval()(input_ids=TOKENS).logits
    engine.destroy()
    return logits.float()


@pytest.fixture(scope="module")
def saved(
    run_ranks: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], tuple[Path, torch.Tensor]]:
    runs = {}
    for precision, is_tied in (("bf16", True), ("fp32", False)):
        folder = tmp_path_factory.mktemp("run")
        tiny_config(**SIZES, tie_word_embeddings=is_tied).save_pretrained(folder / "model")
        runs[precision, is_tied] = folder, run_ranks(train_and_save, 2, str(folder), precision, is_tied)[0]
    return runs


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("precision", "is_tied"), [("bf16", True), ("fp32", False)])
def test_an_exported_model_gives_the_logits_of_the_trained_one(saved, tmp_path: Path, precision, is_tied) -> None:
    run, expected = saved[precision, is_tied]
    out = tmp_path / "model"
    assert cli.main(["export", str(run), str(out), "--dtype", precision, "--max-shard-size", "50kB"]) == 0
    model = load(out)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert model.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits.float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=0 if precision == "bf16" else 1e-6)


@pytest.mark.parametrize(("form", "error"), [("int8", 0.05), ("int4", 0.4)])
def test_a_quantised_model_loads_and_is_near(saved, tmp_path: Path, form, error) -> None:
    pytest.importorskip("bitsandbytes")
    run, expected = saved["fp32", False]
    out = tmp_path / form
    assert cli.main(["export", str(run), str(out), "--quantise", form]) == 0
    model = load(out)
    kind = {"int8": "Linear8bitLt", "int4": "Linear4bit"}[form]
    layers = [name for name, module in model.named_modules() if type(module).__name__ == kind]
    assert len(layers) == 2 * 7
    assert type(model.lm_head) is torch.nn.Linear
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits.float()
    distance = (logits - expected).norm() / expected.norm()
    assert 0 < distance < error


def test_an_adapter_is_merged_as_the_layers_would_add_it(saved, tmp_path: Path) -> None:
    from tests.unit.checkpoint.test_adapter import config, factors, write_adapter

    run, _ = saved["fp32", False]
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    tensors = {name: tensor for module in names for name, tensor in factors(module, 64, 64).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, config(target_modules=["q_proj"]))
    assert cli.main(["export", str(run), str(tmp_path / "plain")]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "merged"), "--merge-adapter", str(adapter)]) == 0
    plain, merged = load(tmp_path / "plain"), load(tmp_path / "merged")
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        # what a LoRA layer does in its forward
        plain.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, a=a, b=b: output + 3.0 * (inputs[0] @ a.T @ b.T)
        )
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits, rtol=1e-5, atol=1e-5
        )


def test_merging_equals_pefts_own(saved, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run, _ = saved["fp32", False]
    assert cli.main(["export", str(run), str(tmp_path / "plain")]) == 0
    torch.manual_seed(5)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 2}
    )
    wrapped = peft.get_peft_model(load(tmp_path / "plain"), settings)
    for name, param in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(param)
    wrapped.save_pretrained(tmp_path / "adapter")
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--merge-adapter", str(tmp_path / "adapter")]) == 0
    expected, found = wrapped.merge_and_unload().state_dict(), load(tmp_path / "out").state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
