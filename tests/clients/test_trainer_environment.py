"""A Trainer that learns of ZeRO from `accelerate launch`, that finds its batch size, and that is used again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.auto_configs import trainer_config
from tests.clients.clients_common import Run, assert_same, fresh_clients, logged, tiny_llama, token_rows, whole_weights
from tests.clients.test_trainer_stages import arguments

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")


def launched(folder: str, variables: dict[str, str] | None) -> Run:
    """Train with arguments that name no ZeRO; `variables` are those that `accelerate launch` makes of its file."""
    from transformers import Trainer, TrainingArguments

    with fresh_clients(is_sharded=variables is not None):
        os.environ.update(variables or {})
        args = arguments(folder, None if variables is None else {}, kind=TrainingArguments)
        model = tiny_llama()
        trainer = Trainer(model=model, args=args, train_dataset=token_rows(24))
        trainer.train()
        assert trainer.is_deepspeed_enabled == (variables is not None)
        return Run(logged(trainer, "loss"), logged(trainer, "grad_norm"), whole_weights(model))


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_trainer_takes_what_accelerate_launch_was_told(run_ranks, tmp_path: Path, stage, offload) -> None:
    variables = {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": offload,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": offload if stage == 3 else "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true" if stage == 3 else "false",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
    }
    run = run_ranks(launched, 2, str(tmp_path), variables)[0]
    assert_same(run, run_ranks(launched, 2, str(tmp_path), None)[0])


def found(folder: str, config: dict[str, Any], batch_size: int, limit: int) -> Run:
    """Train where batches of more than `limit` rows do not fit."""
    from transformers import Trainer

    class Small(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            if len(inputs["input_ids"]) > limit:
                raise RuntimeError("CUDA out of memory.")
            return loss

    with fresh_clients(is_sharded=True):
        args = arguments(
            folder,
            config,
            auto_find_batch_size=True,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
        )
        model = tiny_llama()
        trainer = Small(model=model, args=args, train_dataset=token_rows(24))
        trainer.train()
        return Run(logged(trainer, "loss"), logged(trainer, "grad_norm"), whole_weights(model))


@pytest.mark.parametrize("stage", [1, 2])  # transformers refuses it at stage 3
def test_a_batch_size_that_does_not_fit_is_halved(run_ranks, tmp_path: Path, stage) -> None:
    """The failed try leaves nothing behind: the run is the one that begins with the smaller size."""
    config = trainer_config(stage)
    run = run_ranks(found, 2, str(tmp_path), config, 4, 2)[0]
    expected = run_ranks(found, 2, str(tmp_path), config, 2, 2)[0]
    assert run.losses == expected.losses
    assert all(torch.equal(run.weights[name], weight) for name, weight in expected.weights.items())


def evaluated_first(folder: str, config: dict[str, Any]) -> None:
    from transformers import Trainer

    model, rows = tiny_llama(), {"train_dataset": token_rows(24), "eval_dataset": token_rows(7)}
    with fresh_clients(is_sharded=True):
        trainer = Trainer(model=model, args=arguments(folder, config), **rows)
        before = trainer.evaluate()["eval_loss"]
        with pytest.raises(RuntimeError, match="this engine was destroyed .* a new Trainer"):
            trainer.train()
    with fresh_clients(is_sharded=True):
        trainer = Trainer(model=model, args=arguments(folder, config), **rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before


def test_after_it_evaluated_a_model_is_trained_by_a_new_trainer(run_ranks, tmp_path: Path) -> None:
    """transformers does not prepare a model twice: a Trainer that has evaluated cannot train, with DeepSpeed either."""
    config = trainer_config(3)
    del config["scheduler"]  # transformers writes 0 steps into it when it evaluates, and then finds that wrong
    run_ranks(evaluated_first, 2, str(tmp_path), config)
