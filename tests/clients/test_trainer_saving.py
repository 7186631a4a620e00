"""transformers' Trainer saves, resumes and loads back: losses, weights and logits as without an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.adapters import adapted
from tests.clients.auto_configs import trainer_config
from tests.clients.clients_common import TOKENS, Run, fresh_clients, logged, tiny_llama, token_rows, whole_weights
from tests.clients.test_trainer_stages import arguments

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")


def trainer_of(folder: str, config: dict[str, Any], model: Any = None, **changes: Any) -> Any:
    from transformers import Trainer

    return Trainer(
        model=tiny_llama() if model is None else model,
        args=arguments(folder, config, **changes),
        train_dataset=token_rows(24),
        eval_dataset=token_rows(7),
    )


def run_of(trainer: Any) -> Run:
    return Run(logged(trainer, "loss"), logged(trainer, "grad_norm"), whole_weights(trainer.model))


def straight_on(folder: str, config: dict[str, Any]) -> Run:
    with fresh_clients(is_sharded=True):
        trainer = trainer_of(folder, config, save_strategy="steps", save_steps=2)
        trainer.train()
        return run_of(trainer)


def resumed(folder: str, config: dict[str, Any]) -> Run:
    with fresh_clients(is_sharded=True):
        trainer = trainer_of(folder, config, save_strategy="no", seed=3)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
        return run_of(trainer)


@pytest.mark.parametrize(
    ("stage", "device", "schedule"),
    [
        *((stage, "none", whose) for stage in (1, 2, 3) for whose in ("config's", "trainer's")),
        (1, "cpu", "config's"),
        (2, "nvme", "config's"),
        (3, "cpu", "config's"),
        (3, "nvme", "trainer's"),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(run_ranks, tmp_path: Path, stage, device, schedule) -> None:
    config = trainer_config(stage, device, str(tmp_path / "disk"))
    if schedule == "trainer's":
        del config["scheduler"]
    expected = run_ranks(straight_on, 2, str(tmp_path), config)[0]
    run = run_ranks(resumed, 2, str(tmp_path), config)[0]
    assert run.losses == expected.losses  # the log of the first two steps is the checkpoint's
    assert run.norms == expected.norms
    assert all(torch.equal(run.weights[name], weight) for name, weight in expected.weights.items())


def best_at_end(folder: str, config: dict[str, Any], has_adapters: bool) -> None:
    from transformers import Trainer

    with fresh_clients(is_sharded=True):
        args = arguments(
            folder,
            config,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="closeness",
            greater_is_better=True,
        )
        seen: list[dict[str, torch.Tensor]] = []
        model = adapted("lora") if has_adapters else tiny_llama()
        trained = next(name for name, param in model.named_parameters() if param.requires_grad)

        def closeness(predictions: Any) -> dict[str, float]:
            seen.append(whole_weights(model))
            return {"closeness": -abs(len(seen) - 3.0)}  # the third of four evaluations is the best

        rows = {"train_dataset": token_rows(24), "eval_dataset": token_rows(7)}
        trainer = Trainer(model=model, args=args, compute_metrics=closeness, **rows)
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
        weights = whole_weights(model)
        assert len(seen) == 4
        assert all(torch.equal(weight, seen[2][name]) for name, weight in weights.items())
        assert not torch.equal(seen[2][trained], seen[3][trained])


@pytest.mark.parametrize(("stage", "has_adapters"), [(1, False), (2, False), (3, False), (3, True)])
def test_the_best_model_is_there_at_the_end(run_ranks, tmp_path: Path, stage, has_adapters) -> None:
    run_ranks(best_at_end, 2, str(tmp_path), trainer_config(stage), has_adapters)


def train_and_save(folder: str, config: dict[str, Any], is_tied: bool) -> torch.Tensor:
    """Return the logits of the trained model."""
    with fresh_clients(is_sharded=True):
        trainer = trainer_of(folder, config, tiny_llama(tie_word_embeddings=is_tied), max_steps=1)
        trainer.train()
        trainer.save_model(f"{folder}/final")
        with torch.no_grad():
            return trainer.model_wrapped.eval()(input_ids=TOKENS).logits


def loaded_logits(folder: str) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(f"{folder}/final")(input_ids=TOKENS).logits


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_saved_model_answers_as_the_trained_one(run_ranks, tmp_path: Path, stage, is_tied) -> None:
    logits = run_ranks(train_and_save, 2, str(tmp_path), trainer_config(stage), is_tied)[0]
    loaded = run_ranks(loaded_logits, 1, str(tmp_path), joins_world=False)[0]
    torch.testing.assert_close(loaded, logits, rtol=1e-5, atol=1e-6)


def test_without_the_gather_flag_a_checkpoint_is_saved_instead(run_ranks, tmp_path: Path) -> None:
    config = trainer_config(3)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    run_ranks(train_and_save, 2, str(tmp_path), config, False)
    assert not list((tmp_path / "final").glob("*.safetensors"))
    tag = (tmp_path / "final" / "latest").read_text().strip()
    assert json.loads((tmp_path / "final" / tag / "index.json").read_text())
