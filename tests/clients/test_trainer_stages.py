"""transformers' Trainer with a file in which everything is "auto": the same run at every stage as without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.clients.auto_configs import trainer_config
from tests.clients.clients_common import (
    Run,
    assert_same,
    fresh_clients,
    logged,
    tiny_llama,
    token_rows,
    trainer_settings,
    whole_weights,
)

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")


class Trained(NamedTuple):
    """What a script with a Trainer saw."""

    run: Run
    eval_loss: float
    predictions: Any


def arguments(folder: str, config: dict[str, Any] | None, *, kind: Any = None, **changes: Any) -> Any:
    """Return TrainingArguments (or a `kind` of them), as `trainer_settings` has them."""
    from transformers import TrainingArguments

    kind = kind or TrainingArguments
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(**{**settings, **trainer_settings(config), **changes})


def plain_optimizers(model: Any) -> tuple[Any, Any]:
    """Return what the config asks for, made by hand."""
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = WarmupDecayLR(optimizer, total_num_steps=4, warmup_min_lr=0, warmup_max_lr=1e-2, warmup_num_steps=2)
    return optimizer, schedule


def train(folder: str, config: dict[str, Any] | None, **changes: Any) -> Trained:
    from transformers import Trainer

    with fresh_clients(is_sharded=config is not None):
        args = arguments(folder, config, **changes)
        model = tiny_llama()
        optimizers = plain_optimizers(model) if config is None else (None, None)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=token_rows(24),
            eval_dataset=token_rows(7),
            optimizers=optimizers,
        )
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
        predictions = torch.from_numpy(trainer.predict(token_rows(5)).predictions)
        run = Run(logged(trainer, "loss"), logged(trainer, "grad_norm"), whole_weights(model))
        return Trained(run, eval_loss, predictions)


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_trainer_trains_evaluates_and_predicts_as_in_plain_pytorch(run_ranks, tmp_path: Path, stage, device) -> None:
    config = trainer_config(stage, device, str(tmp_path))
    got = run_ranks(train, 2, str(tmp_path), config)[0]
    expected = run_ranks(train, 2, str(tmp_path), None)[0]
    assert_same(got.run, expected.run)
    assert got.eval_loss == pytest.approx(expected.eval_loss, abs=1e-5)
    torch.testing.assert_close(got.predictions, expected.predictions, rtol=1e-4, atol=1e-4)
