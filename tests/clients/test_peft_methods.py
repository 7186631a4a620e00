"""PEFT's methods on an engine train as they do in plain PyTorch, whatever the stage."""

from __future__ import annotations

import contextlib
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
from tests.clients.clients_common import assert_shares_are_kept, ds_config, tiny_llama, whole_weights

pytest.importorskip("peft", reason="needs peft (the hf extra)")
pytestmark = pytest.mark.clients

NUM_STEPS = 5
METHODS = ["lora", "dora", "modules_to_save", "adalora", "ia3", "prompt"]


def losses_on_an_engine(model: Any, config: dict[str, Any], method: str) -> tuple[Any, list[float]]:
    import deepspeed

    threshold = config["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)

    optimizer = torch.optim.AdamW(trained(model), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for step in range(NUM_STEPS):
        loss = loss_of(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        if method == "adalora":
            # PEFT multiplies weights with gradients outside of a forward: weights must be whole
            block = deepspeed.zero.GatheredParameters(trained(model), modifier_rank=0)
            with contextlib.nullcontext() if threshold else block:
                model.update_and_allocate(step)
        losses.append(mean_over_ranks(loss))
    return engine, losses


def masked_in(model: Any) -> list[list[bool]]:
    """Return which singular values AdaLoRA has masked, by layer. Collective."""
    return [(value == 0).flatten().tolist() for name, value in whole_weights(model).items() if "lora_E" in name]


def train_at_all_stages(method: str, folder: str) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    twin = adapted(method)
    after_backward = twin.update_and_allocate if method == "adalora" else lambda step: None
    expected = plain_losses(twin, NUM_STEPS, dist.get_world_size(), after_backward)
    for stage in (1, 2, 3):
        alive = HfDeepSpeedConfig(ds_config(stage))
        model = adapted(method, AutoModelForCausalLM.from_pretrained(folder))
        if stage == 3:
            assert model.get_base_model().model.norm.weight.shape == (0,), "the base was not loaded as shards"
        engine, losses = losses_on_an_engine(model, ds_config(stage), method)
        assert losses == pytest.approx(expected, abs=1e-5), f"stage {stage}"
        if method == "adalora":
            assert masked_in(model) == masked_in(twin), "ranks were given to other layers"
        if stage == 3:
            assert_shares_are_kept(model.parameters())
        engine.destroy()
        del alive
    assert method != "adalora" or sum(map(sum, masked_in(twin))) == 12, "each of 4 layers has 6 and may keep 3"
    assert max(expected) - min(expected) > 1e-2, "nothing was learnt: equal losses would say little"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_those_of_plain_pytorch(run_ranks, base, method) -> None:
    run_ranks(train_at_all_stages, 2, method, base, timeout_s=150.0)


def documented_adalora(folder: str) -> None:
    """Train with PEFT's documented loop, which gathers nothing: above the threshold is the base, below are adapters."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    twin = adapted("adalora")
    expected = plain_losses(twin, NUM_STEPS, dist.get_world_size(), twin.update_and_allocate)
    config = ds_config(3)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 500  # 100,000 for models of a real size
    alive = HfDeepSpeedConfig(config)
    model = adapted("adalora", AutoModelForCausalLM.from_pretrained(folder))
    engine, losses = losses_on_an_engine(model, config, "adalora")
    assert losses == pytest.approx(expected, abs=1e-5)
    assert masked_in(model) == masked_in(twin)
    assert all(param.numel() > 0 for param in trained(model))
    frozen = [param for name, param in model.named_parameters() if "proj.base_layer.weight" in name]
    assert len(frozen) == 4
    assert all(param.numel() == 0 for param in frozen), "the base is not sharded"
    engine.destroy()
    del alive


def test_adalora_trains_by_its_documented_loop(run_ranks, base) -> None:
    run_ranks(documented_adalora, 2, base, timeout_s=120.0)


# --- adapters made of the weights -------------------------------------------------------------------------------------


def made_of_weights(how: str, folder: str) -> None:
    """LoRA's matrices come from the base, which is there as shards: PEFT gathers and writes it layer by layer."""
    import peft
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    def made(base: Any) -> Any:
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=how)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return peft.get_peft_model(base, lora)

    twin = made(AutoModelForCausalLM.from_pretrained(folder))
    expected = plain_losses(twin, NUM_STEPS, dist.get_world_size())
    alive = HfDeepSpeedConfig(ds_config(3))
    model = made(AutoModelForCausalLM.from_pretrained(folder))
    assert model.get_base_model().model.norm.weight.shape == (0,), "the base was not loaded as shards"
    engine, losses = losses_on_an_engine(model, ds_config(3), "lora")
    assert losses == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2
    assert_shares_are_kept(model.parameters())
    engine.destroy()
    del alive


@pytest.mark.parametrize("how", ["pissa", "olora", "orthogonal"])
def test_adapters_are_made_of_sharded_weights(run_ranks, base, how) -> None:
    run_ranks(made_of_weights, 2, how, base, timeout_s=120.0)


# --- several adapters -------------------------------------------------------------------------------------------------


def two_adapters() -> Any:
    import peft

    model = adapted("lora")
    with torch.random.fork_rng():
        torch.manual_seed(23)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model


def logits_by_adapter(model: Any) -> dict[str, torch.Tensor]:
    """Return the logits with each adapter, and with none."""
    found = {}
    for name in ("other", "default"):
        model.set_adapter(name)
        found[name] = logits_of(model)
    with model.disable_adapter():
        found["none"] = logits_of(model)
    return found


def switch_adapters(stage: int) -> None:
    twin, model = two_adapters(), two_adapters()
    expected_losses = plain_losses(twin, NUM_STEPS, dist.get_world_size())
    engine, losses = losses_on_an_engine(model, ds_config(stage), "lora")
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    expected, found = logits_by_adapter(twin), logits_by_adapter(model)
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-5, msg=lambda m, n=name: f"adapter {n}: {m}")
    assert (expected["default"] - expected["other"]).abs().max() > 0.01
    loss = loss_of(engine, NUM_STEPS, dist.get_rank())  # and training goes on
    engine.backward(loss)
    engine.step()
    assert mean_over_ranks(loss) == pytest.approx(plain_losses_now(twin), abs=1e-5)
    engine.destroy()


def plain_losses_now(model: Any) -> float:
    with torch.no_grad():
        losses = [loss_of(model, NUM_STEPS, rank) for rank in range(dist.get_world_size())]
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_are_switched_between_steps(run_ranks, stage) -> None:
    run_ranks(switch_adapters, 2, stage, timeout_s=120.0)


def train_in_turns(stage: int | None) -> list[float]:
    """Train two adapters by turns on one optimizer, in plain PyTorch with stage None; returns the losses."""
    import deepspeed

    model = two_adapters()
    adapters = [param for name, param in model.named_parameters() if "lora" in name]
    for param in adapters:
        param.requires_grad_(True)  # what is trained is settled when the engine is made
    optimizer = torch.optim.AdamW(adapters, lr=LR)
    ranks = range(dist.get_world_size())
    engine = None
    if stage is not None:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(stage))
    losses = []
    for step, name in enumerate(["default", "default", "other", "other", "default", "other"]):
        model.set_adapter(name)
        if engine is not None:
            loss = loss_of(engine, step, dist.get_rank())
            engine.backward(loss)
            engine.step()
            losses.append(mean_over_ranks(loss))
        else:
            loss = torch.stack([loss_of(model, step, rank) for rank in ranks]).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    if engine is not None:
        engine.destroy()
    return losses


def train_in_turns_beside_plain_pytorch() -> None:
    expected = train_in_turns(None)
    for stage in (1, 2, 3):
        assert train_in_turns(stage) == pytest.approx(expected, abs=1e-5), f"stage {stage}"


def test_adapters_are_trained_by_turns(run_ranks) -> None:
    run_ranks(train_in_turns_beside_plain_pytorch, 2, timeout_s=120.0)


# --- saved and loaded back --------------------------------------------------------------------------------------------


def train_and_save(folder: str, stage: int, method: str, how: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Save the adapter from the model as it is, gathered, or with the weights that accelerate has put together."""
    from transformers.integrations import HfDeepSpeedConfig

    from craken.zero import GatheredParameters

    config = ds_config(stage)
    if how == "as it is":
        del config["zero_optimization"]["stage3_param_persistence_threshold"]
    alive = HfDeepSpeedConfig(config)
    model = adapted(method)
    engine, _ = losses_on_an_engine(model, config, method)
    whole = engine._zero3_consolidated_16bit_state_dict() if how == "put together" else None
    is_main = dist.get_rank() == 0
    with GatheredParameters(model.parameters() if how == "gathered" else None):
        model.save_pretrained(folder, state_dict=whole, is_main_process=is_main)
    with GatheredParameters(model.parameters()):
        weights = {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
    logits = logits_of(engine)
    engine.destroy()
    del alive
    return logits, weights


@pytest.mark.parametrize(
    ("method", "stage", "how"),
    [
        ("lora", 2, "as it is"),
        ("lora", 3, "as it is"),
        ("lora", 3, "put together"),
        *((method, 3, "gathered") for method in METHODS),
    ],
)
def test_a_saved_adapter_loads_back_equal(run_ranks, tmp_path: Path, method, stage, how) -> None:
    import peft

    run = run_ranks(train_and_save, 2, str(tmp_path), stage, method, how, timeout_s=120.0)
    logits, weights = run[0]
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    found = dict(loaded.named_parameters())
    assert weights.keys() <= found.keys()
    if method != "adalora":  # which leaves rows out that it has masked
        assert all(torch.equal(found[name], value) for name, value in weights.items())
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-6)


def load_onto_shards(folder: str, base: str, stage: int) -> None:
    """Load an adapter onto a model that is built as shards, go on training it, and load it again beside itself."""
    import peft
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    def loaded() -> Any:
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True)

    twin = loaded()
    logits, expected = logits_of(twin), plain_losses(twin, NUM_STEPS, dist.get_world_size())
    alive = HfDeepSpeedConfig(ds_config(stage))
    model = loaded()
    assert (model.get_base_model().model.norm.weight.numel() == 0) == (stage == 3)
    engine, losses = losses_on_an_engine(model, ds_config(stage), "lora")
    assert losses == pytest.approx(expected, abs=1e-5)
    model.load_adapter(folder, "again")
    model.set_adapter("again")
    torch.testing.assert_close(logits_of(engine), logits, rtol=0, atol=1e-5)
    model.set_adapter("default")
    assert (logits_of(engine) - logits).abs().max() > 0.01
    engine.destroy()
    del alive


@pytest.mark.parametrize("stage", [2, 3])
def test_a_saved_adapter_is_loaded_onto_shards(run_ranks, base, tmp_path: Path, stage) -> None:
    adapted("lora").save_pretrained(tmp_path)
    run_ranks(load_onto_shards, 2, str(tmp_path), base, stage, timeout_s=120.0)
