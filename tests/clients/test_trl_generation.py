"""TRL's training that generates, under stages 2 and 3: GRPO, and `unwrap_model_for_generation` between steps."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.clients import trl_runs
from tests.clients.clients_common import logged
from tests.clients.trl_runs import assert_like_plain_pytorch, dataset, lora, numbers, said, settings

pytest.importorskip("trl", reason="needs trl (the hf extra)")
pytestmark = pytest.mark.clients


def share_of_numbers(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward answers by how many of their words are numbers."""
    words = [completion[0]["content"].split() for completion in completions]
    return [sum(word in trl_runs.WORDS[:11] for word in said) / max(1, len(said)) for said in words]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    trl_runs.model().save_pretrained(folder)
    trl_runs.tokenizer().save_pretrained(folder)
    return str(folder)


def grpo(folder: str, base: str, has_adapter: bool, gathers: bool, arguments: dict[str, Any]) -> list[float]:
    """Return each step's loss and reward, with a reference model at hand."""
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        **settings(
            folder,
            max_steps=3,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=8,
            beta=0.5,
            gradient_checkpointing=False,
            ds3_gather_for_generation=gathers,
            **arguments,
        )
    )
    trainer = GRPOTrainer(
        model=base,
        reward_funcs=share_of_numbers,
        args=args,
        train_dataset=dataset([{"prompt": said(question)} for question, _, _ in numbers(16)]),
        peft_config=lora(init_lora_weights=False) if has_adapter else None,
    )
    trainer.train()
    return [*logged(trainer, "loss"), *logged(trainer, "reward")]


def grpo_beside_plain_pytorch(folder: str, base: str, has_adapter: bool, gathers: bool) -> None:
    assert_like_plain_pytorch(partial(grpo, folder, base, has_adapter, gathers))


@pytest.mark.parametrize(("has_adapter", "gathers"), [(False, True), (False, False), (True, True)])
def test_grpo_learns_as_in_plain_pytorch(run_ranks, tmp_path: Path, base: str, has_adapter, gathers) -> None:
    run_ranks(grpo_beside_plain_pytorch, 2, str(tmp_path), base, has_adapter, gathers, timeout_s=150.0)


# --- generation between the steps of any trainer ----------------------------------------------------------------------


def generating_callback(gathers: bool) -> Any:
    from transformers import TrainerCallback
    from trl.models import unwrap_model_for_generation

    class Generates(TrainerCallback):
        """Keeps what the model says after each step."""

        def __init__(self) -> None:
            self.trainer: Any = None
            self.said: list[Tensor] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            prompts = trl_runs.tokenizer()(["what comes after two ?"], return_tensors="pt")["input_ids"]
            wrapped, accelerator = self.trainer.model_wrapped, self.trainer.accelerator
            with (
                unwrap_model_for_generation(wrapped, accelerator, gather_deepspeed3_params=gathers) as model,
                torch.no_grad(),
            ):
                self.said.append(model.generate(prompts, max_new_tokens=6, do_sample=False))

    return Generates()


def generate_between_steps(folder: str, base: str, gathers: bool, arguments: dict[str, Any]) -> list[float]:
    """Return the losses, and after them every token that was said."""
    from trl import SFTConfig, SFTTrainer

    callback = generating_callback(gathers)
    rows = [{"text": f"{question} {answer} <|im_end|>"} for question, answer, _ in numbers(32)]
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(**settings(folder, learning_rate=2e-2, gradient_checkpointing=False, **arguments)),
        train_dataset=dataset(rows),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    sentences = [tuple(said.flatten().tolist()) for said in callback.said]
    assert len(set(sentences)) > 1, f"the model said the same all along: {sentences}"
    return [*logged(trainer, "loss"), *(float(token) for sentence in sentences for token in sentence)]


def generate_beside_plain_pytorch(folder: str, base: str, gathers: bool) -> None:
    assert_like_plain_pytorch(partial(generate_between_steps, folder, base, gathers))


@pytest.mark.parametrize("gathers", [True, False])
def test_models_generate_between_steps(run_ranks, tmp_path: Path, base: str, gathers: bool) -> None:
    run_ranks(generate_beside_plain_pytorch, 2, str(tmp_path), base, gathers, timeout_s=150.0)
