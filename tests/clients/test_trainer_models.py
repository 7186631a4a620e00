"""What users do with models under a Trainer: recompute activations, tie heads, evaluate alone, generate in step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.clients.auto_configs import trainer_config
from tests.clients.clients_common import (
    Run,
    accelerator_of,
    assert_same,
    fresh_clients,
    logged,
    tiny_llama,
    token_rows,
    whole_weights,
)
from tests.clients.test_trainer_stages import arguments, plain_optimizers

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")


def train(folder: str, config: dict[str, Any] | None, model_settings: dict[str, Any], **changes: Any) -> Run:
    from transformers import Trainer

    with fresh_clients(is_sharded=config is not None):
        args = arguments(folder, config, **changes)
        model = tiny_llama(**model_settings)
        optimizers = plain_optimizers(model) if config is None else (None, None)
        trainer = Trainer(model=model, args=args, train_dataset=token_rows(24), optimizers=optimizers)
        trainer.train()
        return Run(logged(trainer, "loss"), logged(trainer, "grad_norm"), whole_weights(model))


@pytest.mark.parametrize("is_reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("stage", [2, 3])
def test_activations_may_be_recomputed(run_ranks, tmp_path: Path, stage, is_reentrant) -> None:
    ways = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": is_reentrant}}
    run = run_ranks(train, 2, str(tmp_path), trainer_config(stage), {}, **ways)[0]
    assert_same(run, run_ranks(train, 2, str(tmp_path), None, {})[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_tied_head_is_trained_once(run_ranks, tmp_path: Path, stage) -> None:
    run = run_ranks(train, 2, str(tmp_path), trainer_config(stage), {"tie_word_embeddings": True})[0]
    assert "lm_head.weight" not in run.weights
    assert_same(run, run_ranks(train, 2, str(tmp_path), None, {"tie_word_embeddings": True})[0])


def evaluate_alone(folder: str, config: dict[str, Any] | None) -> float:
    from transformers import Trainer

    with fresh_clients(is_sharded=config is not None):
        args = arguments(folder, config)
        trainer = Trainer(model=tiny_llama(), args=args, eval_dataset=token_rows(7))
        first = trainer.evaluate()["eval_loss"]
        assert trainer.evaluate()["eval_loss"] == first
        if config is not None:
            assert all(param.shape == (0,) for param in trainer.model.parameters() if param.ds_numel > 320)
        return first


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_a_model_may_be_evaluated_and_never_trained(run_ranks, tmp_path: Path, device) -> None:
    """At stage 3: transformers refuses others by itself."""
    config = trainer_config(3, device)
    expected = run_ranks(evaluate_alone, 2, str(tmp_path), None)[0]
    assert run_ranks(evaluate_alone, 2, str(tmp_path), config)[0] == pytest.approx(expected, abs=1e-5)


def prompts() -> list[torch.Tensor]:
    return [torch.arange(3, 3 + length).view(1, -1) for length in (3, 7)]


def generated_alone(folder: str) -> list[list[int]]:
    """Save a model whose ranks will stop at different lengths; return what it answers."""
    model = tiny_llama(initializer_range=0.5)

    def answers() -> list[list[int]]:
        return [model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist() for prompt in prompts()]

    first, second = answers()
    model.generation_config.eos_token_id = next(token for token in first[3:] if token not in second[7:])
    model.save_pretrained(folder)
    return answers()


def generated_in_step(folder: str, is_offloaded: bool) -> list[int]:
    """Every rank has its own prompt, and other ranks' forwards go on when its answer has ended."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers import LlamaForCausalLM

    with fresh_clients(is_sharded=True):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                **({"offload_param": {"device": "cpu"}} if is_offloaded else {}),
            },
        }
        accelerator = accelerator_of(DeepSpeedPlugin(hf_ds_config=config))
        model = accelerator.prepare(LlamaForCausalLM.from_pretrained(folder))
        prompt = prompts()[dist.get_rank()]
        answers = [
            source.generate(prompt, max_new_tokens=8, do_sample=False, synced_gpus=True)[0].tolist()
            for source in (model, accelerator.unwrap_model(model))
        ]
        assert answers[0] == answers[1]
        assert all(param.shape == (0,) for param in model.parameters())
        accelerator.free_memory()
        return answers[0]


@pytest.mark.parametrize("is_offloaded", [False, True], ids=["device", "host"])
def test_ranks_generate_in_step_whatever_the_length(run_ranks, tmp_path: Path, is_offloaded) -> None:
    expected = run_ranks(generated_alone, 1, str(tmp_path), joins_world=False)[0]
    assert len(expected[0]) < 3 + 8 == len(expected[1]) - 7 + 3, "expected answers of two lengths"
    assert run_ranks(generated_in_step, 2, str(tmp_path), is_offloaded) == expected


def seq2seq(folder: str, config: dict[str, Any] | None) -> tuple[Run, torch.Tensor]:
    from transformers import BartConfig, BartForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    with fresh_clients(is_sharded=config is not None):
        args = arguments(
            folder,
            config,
            kind=Seq2SeqTrainingArguments,
            predict_with_generate=True,
            generation_max_length=6,
            generation_num_beams=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = BartForConditionalGeneration(
                BartConfig(vocab_size=64, max_position_embeddings=32, forced_eos_token_id=None, **sizes, **heads)
            )
        optimizers = plain_optimizers(model) if config is None else (None, None)
        trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=token_rows(24), optimizers=optimizers)
        trainer.train()
        predictions = torch.from_numpy(trainer.predict(token_rows(5)).predictions)
        return Run(logged(trainer, "loss"), logged(trainer, "grad_norm"), whole_weights(model)), predictions


@pytest.mark.parametrize("stage", [2, 3])
def test_a_seq2seq_trainer_predicts_by_generating(run_ranks, tmp_path: Path, stage) -> None:
    run, predictions = run_ranks(seq2seq, 2, str(tmp_path), trainer_config(stage))[0]
    expected, expected_predictions = run_ranks(seq2seq, 2, str(tmp_path), None)[0]
    assert_same(run, expected)
    assert torch.equal(predictions, expected_predictions)
    assert predictions.shape[1] > 2


def loading_peak(folder: str) -> tuple[int, int]:
    """Return how many bytes `from_pretrained` and `_from_config` took at most, this rank's shards included."""
    from transformers import LlamaForCausalLM

    from tests.parity.heap import bytes_in_use, bytes_now

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            Watch.most = max(Watch.most, bytes_now())
            return result

    peaks = []
    for build in (
        lambda: LlamaForCausalLM.from_pretrained(folder),
        lambda: LlamaForCausalLM._from_config(LlamaForCausalLM.config_class.from_pretrained(folder)),
    ):
        with fresh_clients(is_sharded=True):
            alive = arguments(folder, trainer_config(3))  # holds what tells transformers of stage 3
            before = Watch.most = bytes_in_use()
            with Watch():
                model = build()
            peaks.append(Watch.most - before)
            assert all(param.shape == (0,) for param in model.parameters())
            del model, alive
    return peaks[0], peaks[1]


def save_large(folder: str) -> int:
    """Save a model of many blocks in many files; return its bytes."""
    model = tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=16)
    model.save_pretrained(folder, max_shard_size="10MB")
    return sum(param.numel() for param in model.parameters()) * 4


def test_no_rank_ever_holds_a_whole_model_that_is_built_or_loaded(run_ranks, tmp_path: Path) -> None:
    whole = run_ranks(save_large, 1, str(tmp_path), joins_world=False)[0]
    for loaded, built in run_ranks(loading_peak, 2, str(tmp_path), timeout_s=120):
        # half of it as shards, and at most 32 MB lent to what looks whether all weights have values
        assert loaded < whole / 2 + (40 << 20)
        assert built < whole / 2 + (12 << 20)
