"""Hugging Face models under ZeRO-3: built from a configuration, and loaded, as shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.clients.adapters import LR, mean_over_ranks
from tests.clients.clients_common import assert_shares_are_kept, ds_config, tiny_config, whole_weights
from tests.parity.side_by_side import value

pytest.importorskip("transformers", reason="needs transformers (the hf extra)")
pytest.importorskip("deepspeed", reason="needs the drop-in")
pytestmark = pytest.mark.clients


def zero3_config() -> dict[str, Any]:
    """What a user's file looks like before a trainer has filled it in."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "steps_per_print": float("inf"),
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }


def logits_of(model: Any) -> torch.Tensor:
    import craken

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = craken.initialize(model=model, config=config)
    with torch.no_grad():
        logits = engine(input_ids=torch.arange(16).view(2, 8)).logits
    assert all(param.shape == (0,) for param in model.parameters())
    engine.destroy()
    return logits


def from_config() -> None:
    import deepspeed
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    torch.manual_seed(7)
    built_plainly = LlamaForCausalLM(tiny_config())
    torch.manual_seed(7 + dist.get_rank())
    alive = HfDeepSpeedConfig(zero3_config())
    with deepspeed.zero.Init(config_dict_or_path=zero3_config()):
        by_hand = LlamaForCausalLM(tiny_config())
    for param, whole in zip(by_hand.parameters(), built_plainly.parameters(), strict=True):
        assert torch.equal(value(param), whole)
    by_client = LlamaForCausalLM._from_config(tiny_config())
    del alive
    plain = LlamaForCausalLM(tiny_config()).eval()
    for model in (by_hand, by_client):
        assert all(param.shape == (0,) for param in model.parameters())
        assert model.model.rotary_emb.inv_freq.dtype is torch.float32
        assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
        with deepspeed.zero.GatheredParameters(model.parameters()):
            assert all(param.shape == param.ds_shape for param in model.parameters())
            assert 0.01 < model.lm_head.weight.std() < 0.03, "expected the configuration's initializer_range, 0.02"
            plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected = plain(input_ids=torch.arange(16).view(2, 8)).logits
        torch.testing.assert_close(logits_of(model.eval()), expected, rtol=1e-5, atol=1e-6)


def test_a_model_is_built_from_its_configuration(run_ranks) -> None:
    run_ranks(from_config, 2)


def save_tiny(folder: str, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    torch.manual_seed(3)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).save_pretrained(folder)


def from_pretrained(folder: str, dtype: str) -> None:
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = zero3_config()
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
    alive = HfDeepSpeedConfig(config)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    del alive
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    assert all(param.shape == (0,) for param in model.parameters())
    assert {str(param.dtype) for param in model.parameters()} == {f"torch.{dtype}"}
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    with torch.no_grad():
        expected = plain(input_ids=torch.arange(16).view(2, 8)).logits
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_model_is_loaded_as_shards(run_ranks, tmp_path: Path, tied, dtype) -> None:
    run_ranks(save_tiny, 1, str(tmp_path), tied)
    run_ranks(from_pretrained, 2, str(tmp_path), dtype)


def resized(takes_means: bool, is_gathered: bool) -> None:
    """Rows of old tokens stay to the bit; those of new ones are rank 0's, near the mean of the old ones if asked."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    import craken

    alive = HfDeepSpeedConfig(zero3_config())
    torch.manual_seed(3 + dist.get_rank())
    model = LlamaForCausalLM._from_config(tiny_config())
    before = [value(matrix) for matrix in (model.model.embed_tokens.weight, model.lm_head.weight)]
    with craken.GatheredParameters(model.parameters() if is_gathered else None, modifier_rank=0):
        model.resize_token_embeddings(80, mean_resizing=takes_means)
    del alive
    assert model.config.vocab_size == 80
    logits = logits_of(model.eval())
    matrices = [value(matrix) for matrix in (model.model.embed_tokens.weight, model.lm_head.weight)]
    for old, new in zip(before, matrices, strict=True):
        assert torch.equal(new[:64], old)
        spread = (new[64:] - old.mean(dim=0)).abs().max().item()
        assert spread < 1e-4 if takes_means else spread > 1e-3
    of_rank_0 = [matrix.clone() for matrix in matrices]
    for mine, theirs in zip(matrices, of_rank_0, strict=True):
        dist.broadcast(theirs, 0)
        assert torch.equal(mine, theirs), "ranks drew other rows"
    plain = LlamaForCausalLM(model.config).eval()
    plain.load_state_dict({name: value(param) for name, param in model.named_parameters()}, strict=False)
    with torch.no_grad():
        assert torch.equal(logits, plain(input_ids=torch.arange(16).view(2, 8)).logits)


@pytest.mark.parametrize("is_gathered", [False, True], ids=["as shards", "gathered"])
@pytest.mark.parametrize("takes_means", [False, True], ids=["random rows", "mean rows"])
def test_embeddings_can_be_resized(run_ranks, takes_means, is_gathered) -> None:
    run_ranks(resized, 2, takes_means, is_gathered)


def train_resized(folder: str, stage: int) -> None:
    """Train a model with a tied head that has grown by 16 tokens, on all of its tokens."""
    import deepspeed
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    def loss_of(model: Any, step: int, rank: int) -> torch.Tensor:
        batch = torch.randint(0, 80, (2, 12), generator=torch.Generator().manual_seed(100 * step + rank))
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    alive = HfDeepSpeedConfig(ds_config(stage))
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(3 + dist.get_rank())  # rank 0's new rows become everybody's
    model.resize_token_embeddings(80)
    del alive
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=LR), config=ds_config(stage)
    )
    twin = LlamaForCausalLM(model.config)
    twin.load_state_dict(whole_weights(model), strict=False)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    optimizer = torch.optim.AdamW(twin.parameters(), lr=LR)
    losses, expected = [], []
    for step in range(5):
        loss = loss_of(engine, step, dist.get_rank())
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_ranks(loss))
        plain = torch.stack([loss_of(twin, step, rank) for rank in range(dist.get_world_size())]).mean()
        plain.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(plain.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-2, "nothing was learnt: equal losses would say little"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if stage == 3:
        assert_shares_are_kept(model.parameters())
    weights, twins = whole_weights(model), dict(twin.named_parameters())
    assert weights["model.embed_tokens.weight"].shape == (80, 32)
    torch.testing.assert_close(
        weights["model.embed_tokens.weight"], twins["model.embed_tokens.weight"], rtol=0, atol=1e-4
    )
    engine.destroy()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_with_a_tied_head_that_has_grown_trains_as_in_plain_pytorch(run_ranks, tmp_path: Path, stage) -> None:
    run_ranks(save_tiny, 1, str(tmp_path), True)
    run_ranks(train_resized, 2, str(tmp_path), stage, timeout_s=120.0)
