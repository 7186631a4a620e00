"""Models of transformers' library, loaded and trained for a step: loss and weights are those of plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.clients.clients_common import accelerator_of, ds_config, fresh_clients, whole_weights

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")

RATE = 0.5


def drawn(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + rank)


def causal(rank: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, 64, (2, 12), generator=drawn(rank))
    return {"input_ids": tokens, "labels": tokens}


def classes(rank: int) -> dict[str, Tensor]:
    return {"input_ids": causal(rank)["input_ids"], "labels": torch.tensor([rank, 1])}


def images(rank: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=drawn(rank)), "labels": torch.tensor([rank, 1])}


def image_and_text(rank: int) -> dict[str, Any]:
    tokens = torch.randint(3, 63, (2, 8), generator=drawn(rank))
    tokens[:, -1] = 63  # the end of the text, where CLIP takes its vector from
    return {"input_ids": tokens, "pixel_values": images(rank)["pixel_values"], "return_loss": True}


def wave(rank: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 400, generator=drawn(rank)), "labels": torch.tensor([[3, 4], [5, 6 + rank]])}


def spectrogram(rank: int) -> dict[str, Tensor]:
    tokens = torch.randint(3, 64, (2, 6), generator=drawn(rank))
    return {"input_features": torch.randn(2, 8, 40, generator=drawn(rank)), "labels": tokens}


class Architecture(NamedTuple):
    """A class of the library, the settings that make it small, and a batch of a rank's."""

    model: str
    config: str
    inputs: Callable[[int], dict[str, Any]]
    settings: dict[str, Any]


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
WAVES = {
    **SIZES,
    "vocab_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "ctc_loss_reduction": "mean",
    "apply_spec_augment": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 1, "max_position_embeddings": 32}
LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
PATCHES = {"image_size": 32, "patch_size": 8, "num_labels": 3}

ARCHITECTURES = [
    Architecture("GPT2LMHeadModel", "GPT2Config", causal, {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    Architecture("Gemma2ForCausalLM", "Gemma2Config", causal, {**SIZES, "num_key_value_heads": 1, "head_dim": 8}),
    Architecture("MixtralForCausalLM", "MixtralConfig", causal, {**SIZES, **EXPERTS}),
    Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", causal, {**SIZES, **LATENT}),
    Architecture("JambaForCausalLM", "JambaConfig", causal,
                 {**SIZES, "num_key_value_heads": 1, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                  "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4}),
    Architecture("MambaForCausalLM", "MambaConfig", causal, {**SIZES, "state_size": 4, "time_step_rank": 4}),
    Architecture("BertForMaskedLM", "BertConfig", causal, SIZES),
    Architecture("DistilBertForSequenceClassification", "DistilBertConfig", classes,
                 {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
                  "max_position_embeddings": 32, "sinusoidal_pos_embds": True}),
    Architecture("AlbertForMaskedLM", "AlbertConfig", causal, {**SIZES, "embedding_size": 8}),
    Architecture("DebertaV2ForSequenceClassification", "DebertaV2Config", classes,
                 {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    Architecture("T5ForConditionalGeneration", "T5Config", causal,
                 {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                  "decoder_start_token_id": 0}),
    Architecture("BartForConditionalGeneration", "BartConfig", causal, {**BART, "max_position_embeddings": 32}),
    Architecture("Wav2Vec2ForCTC", "Wav2Vec2Config", wave, WAVES),
    Architecture("HubertForCTC", "HubertConfig", wave, {**WAVES, "conv_pos_batch_norm": False}),
    Architecture("SEWDForCTC", "SEWDConfig", wave, {**WAVES, "squeeze_factor": 2}),
    Architecture("WhisperForConditionalGeneration", "WhisperConfig", spectrogram,
                 {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16,
                  "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}),
    Architecture("ViTForImageClassification", "ViTConfig", images, {**SIZES, **PATCHES}),
    Architecture("SwinForImageClassification", "SwinConfig", images,
                 {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
                  "window_size": 4, "num_labels": 3}),
    Architecture("ResNetForImageClassification", "ResNetConfig", images,
                 {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}),
    Architecture("SegformerForImageClassification", "SegformerConfig", images,
                 {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "num_labels": 3}),
    Architecture("CLIPModel", "CLIPConfig", image_and_text,
                 {"text_config": {**SIZES, "max_position_embeddings": 16, "eos_token_id": 63},
                  "vision_config": {**SIZES, **PATCHES}, "projection_dim": 8}),
]  # fmt: skip


def without_chance(config: Any) -> Any:
    """Turn off what draws random numbers in training."""
    parts = [config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        for name, value in vars(part).items():
            if isinstance(value, float) and ("drop" in name or name.startswith("mask_")):
                setattr(part, name, 0.0)
    return config


def config_of(architecture: Architecture) -> Any:
    import transformers

    return without_chance(getattr(transformers, architecture.config)(**architecture.settings))


def save_tiny(folder: str, architecture: Architecture) -> list[str]:
    """Save a tiny model; returns the names of the parameters that its constructor has frozen."""
    import transformers

    torch.manual_seed(11)
    model = getattr(transformers, architecture.model)(config_of(architecture))
    model.save_pretrained(folder)
    return [name for name, param in model.named_parameters() if not param.requires_grad]


def loaded(folder: str, architecture: Architecture, frozen: list[str]) -> nn.Module:
    """Load a model; what is frozen in it does not depend on how transformers loads (without ZeRO-3, it trains all)."""
    import transformers

    model = getattr(transformers, architecture.model).from_pretrained(folder, dtype=torch.float32)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def plain_step(model: nn.Module, batch: dict[str, Any]) -> float:
    """Take a step with the mean of all ranks' gradients."""
    model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    loss = model(**batch).loss
    loss.backward()
    for param in trained:
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        dist.all_reduce(grad)
        param.grad = grad / dist.get_world_size()
    torch.optim.SGD(trained, lr=RATE).step()
    return float(loss.detach())


def sharded_step(model: nn.Module, batch: dict[str, Any], accelerator: Any) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, optimizer = accelerator.prepare(model, optimizer)
    engine.train()
    loss = engine(**batch).loss
    accelerator.backward(loss)
    engine.check_integrity()
    return float(loss.detach())


def accelerator_at(stage: int) -> Any:
    from accelerate.utils import DeepSpeedPlugin

    config = ds_config(stage, gradient_accumulation_steps=1)
    return accelerator_of(DeepSpeedPlugin(hf_ds_config=config))


def step(folder: str, index: int, frozen: list[str]) -> None:
    architecture = ARCHITECTURES[index]
    batch = architecture.inputs(dist.get_rank())
    plain = loaded(folder, architecture, frozen)
    before = whole_weights(plain)
    expected_loss = plain_step(plain, batch)
    expected = whole_weights(plain)
    assert any(not torch.equal(before[name], expected[name]) for name in before)
    for stage in (2, 3):
        with fresh_clients(is_sharded=True):
            accelerator = accelerator_at(stage)
            model = loaded(folder, architecture, frozen)
            assert stage < 3 or all(param.shape == (0,) for param in model.parameters())
            loss = sharded_step(model, batch, accelerator)
            assert abs(loss - expected_loss) < 1e-5, (stage, loss, expected_loss)
            weights = whole_weights(model)
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(
                    weight, expected[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name, s=stage: f"stage {s}, {n}: {m}"
                )
            for (name, buffer), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
                assert buffer.shape == theirs.shape, name
            accelerator.free_memory()


@pytest.mark.parametrize("index", range(len(ARCHITECTURES)), ids=[entry.model for entry in ARCHITECTURES])
def test_a_step_of_an_architecture_is_that_of_plain_pytorch(run_ranks, tmp_path: Path, index) -> None:
    frozen = run_ranks(save_tiny, 1, str(tmp_path), ARCHITECTURES[index], joins_world=False)[0]
    run_ranks(step, 2, str(tmp_path), index, frozen)


def built_as_shards(index: int) -> None:
    """Build a model from its configuration: every rank has the values that one process alone draws."""
    import transformers
    from transformers.initialization import no_init_weights

    architecture = ARCHITECTURES[index]
    model_class = getattr(transformers, architecture.model)
    torch.manual_seed(7)
    with no_init_weights():  # as transformers does it for shards: first the modules, then values for all
        plain = model_class(config_of(architecture))
    plain.initialize_weights()
    plain.tie_weights()
    torch.manual_seed(7 + dist.get_rank())
    with fresh_clients(is_sharded=True):
        accelerator_at(3)
        model = model_class._from_config(config_of(architecture))
        assert all(param.shape == (0,) for param in model.parameters())
        weights = whole_weights(model)
        for name, param in plain.named_parameters():
            # what stands behind a parametrization (weight_norm) gets no values from transformers
            assert torch.equal(weights[name], param) or "parametrizations" in name, name


@pytest.mark.parametrize("index", range(len(ARCHITECTURES)), ids=[entry.model for entry in ARCHITECTURES])
def test_an_architecture_is_built_as_shards_with_the_values_it_has_in_one_process(run_ranks, index) -> None:
    run_ranks(built_as_shards, 2, index)
