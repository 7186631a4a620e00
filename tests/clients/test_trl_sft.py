"""TRL's SFTTrainer under stages 2 and 3: plain texts, packing, completions, chat templates; full weights and LoRA."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients import trl_runs
from tests.clients.adapters import logits_of
from tests.clients.clients_common import logged
from tests.clients.trl_runs import assert_like_plain_pytorch, dataset, lora, numbers, said, settings

pytest.importorskip("trl", reason="needs trl (the hf extra)")
pytestmark = pytest.mark.clients

ROWS = 32


def texts() -> Any:
    return dataset([{"text": f"{question} {answer} <|im_end|>"} for question, answer, _ in numbers(ROWS)])


def completions() -> Any:
    return dataset([{"prompt": f"{question} ", "completion": answer} for question, answer, _ in numbers(ROWS)])


def chats() -> Any:
    return dataset([{"messages": said(question, answer)} for question, answer, _ in numbers(ROWS)])


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "texts": (texts, {}),
    "packed": (texts, {"packing": True, "max_length": 32}),
    "completions": (completions, {"completion_only_loss": True}),
    "chats": (chats, {}),
    "assistant": (chats, {"assistant_only_loss": True, "gradient_checkpointing": True}),
    "accumulated": (chats, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
}


def sft(folder: str, case: str, has_adapter: bool, arguments: dict[str, Any]) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    rows, changes = CASES[case]
    args = SFTConfig(**settings(folder, **{"gradient_checkpointing": False, "max_length": 64, **changes, **arguments}))
    trainer = SFTTrainer(
        model=trl_runs.model(),
        args=args,
        train_dataset=rows(),
        processing_class=trl_runs.tokenizer(),
        peft_config=lora(init_lora_weights=False) if has_adapter else None,
    )
    trainer.train()
    return logged(trainer, "loss")


def train_beside_plain_pytorch(folder: str, case: str, has_adapter: bool) -> None:
    assert_like_plain_pytorch(partial(sft, folder, case, has_adapter))


@pytest.mark.parametrize(
    ("case", "has_adapter"),
    [*((case, False) for case in CASES), ("packed", True), ("assistant", True), ("accumulated", True)],
)
def test_losses_are_those_of_plain_pytorch(run_ranks, tmp_path: Path, case: str, has_adapter: bool) -> None:
    run_ranks(train_beside_plain_pytorch, 2, str(tmp_path), case, has_adapter, timeout_s=150.0)


# --- stopped, resumed, saved ------------------------------------------------------------------------------------------


def lora_trainer(folder: str, stage: int, arguments: dict[str, Any], **changes: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        **settings(
            folder,
            **{
                "packing": True,
                "max_length": 32,
                "gradient_checkpointing": True,
                "save_strategy": "steps",
                "save_steps": 2,
                **changes,
                **arguments,
            },
        )
    )
    return SFTTrainer(
        model=trl_runs.model(),
        args=args,
        train_dataset=texts(),
        processing_class=trl_runs.tokenizer(),
        peft_config=lora(init_lora_weights=False),
    )


def resume_and_save(folder: str, stage: int) -> tuple[list[float], list[float], torch.Tensor]:
    """Train to the end; again from the checkpoint in its middle; save. Returns both runs' losses, and logits."""
    with trl_runs.fresh_clients(stage) as arguments:
        trainer = lora_trainer(f"{folder}/run", stage, arguments)
        trainer.train()
        whole = logged(trainer, "loss")
    with trl_runs.fresh_clients(stage) as arguments:
        trainer = lora_trainer(f"{folder}/run", stage, arguments)
        trainer.train(resume_from_checkpoint=f"{folder}/run/checkpoint-2")
        resumed = logged(trainer, "loss")
        trainer.save_model(f"{folder}/adapter")
        logits = logits_of(trainer.model_wrapped.eval())
    return whole, resumed, logits


@pytest.mark.parametrize("stage", [2, 3])
def test_an_adapter_is_resumed_and_saved(run_ranks, tmp_path: Path, stage: int) -> None:
    import peft

    whole, resumed, logits = run_ranks(resume_and_save, 2, str(tmp_path), stage, timeout_s=150.0)[0]
    assert resumed == whole
    loaded = peft.PeftModel.from_pretrained(trl_runs.model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-6)
