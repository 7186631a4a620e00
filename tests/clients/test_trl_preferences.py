"""TRL's trainers on preferences under stages 2 and 3: DPO and KTO with their reference models, rewards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients import trl_runs
from tests.clients.clients_common import assert_shares_are_kept, logged
from tests.clients.trl_runs import assert_like_plain_pytorch, dataset, lora, numbers, said, settings

pytest.importorskip("trl", reason="needs trl (the hf extra)")
pytestmark = pytest.mark.clients

ROWS = 32


def pairs() -> Any:
    return dataset(
        [
            {"prompt": said(question), "chosen": said("", right), "rejected": said("", wrong)}
            for question, right, wrong in numbers(ROWS)
        ]
    )


def judged() -> Any:
    """Return answers with the word on whether they are right."""
    return dataset(
        [
            {"prompt": said(question), "completion": said("", answer), "label": is_right}
            for question, right, wrong in numbers(ROWS // 2)
            for answer, is_right in ((right, True), (wrong, False))
        ]
    )


def rows_in(folder: Path) -> Any:
    """Return rows that lie on disk: what trainers cache beside them is the same for both ranks."""
    from datasets import disable_progress_bars, load_from_disk

    disable_progress_bars()
    return load_from_disk(str(folder))


def write_assets(folder: Path) -> Path:
    """Write a language model, one that scores answers, and the data."""
    from transformers import LlamaForSequenceClassification

    pairs().save_to_disk(folder / "pairs")
    judged().save_to_disk(folder / "judged")
    torch.manual_seed(5)
    for name, saved in (
        ("model", trl_runs.model()),
        ("scorer", LlamaForSequenceClassification(trl_runs.model(num_labels=1).config)),
    ):
        saved.save_pretrained(folder / name)
        trl_runs.tokenizer().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("preferences"))


def dpo(folder: Path, arguments: dict[str, Any], *, reference: str = "made by the trainer", **changes: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        **settings(str(folder / "run"), **{"gradient_checkpointing": False, "max_length": 64, **changes, **arguments})
    )
    return DPOTrainer(
        model=str(folder / "model"),
        ref_model=trl_runs.model() if reference == "given" else None,
        args=args,
        train_dataset=rows_in(folder / "pairs"),
        peft_config=lora() if reference == "no adapter" else None,
    )


def kto(folder: Path, arguments: dict[str, Any], *, reference: str = "made by the trainer", **changes: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    args = KTOConfig(
        **settings(str(folder / "run"), **{"gradient_checkpointing": False, "max_length": 64, **changes, **arguments})
    )
    return KTOTrainer(
        model=str(folder / "model"),
        args=args,
        train_dataset=rows_in(folder / "judged"),
        peft_config=lora() if reference == "no adapter" else None,
    )


def reward(folder: Path, arguments: dict[str, Any], *, has_adapter: bool = False) -> Any:
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**settings(str(folder / "run"), gradient_checkpointing=False, max_length=64, **arguments))
    return RewardTrainer(
        model=str(folder / "scorer"),
        args=args,
        train_dataset=rows_in(folder / "pairs"),
        peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]) if has_adapter else None,
    )


CASES: dict[str, Callable[..., Any]] = {
    "dpo": dpo,
    "dpo, reference given": partial(dpo, reference="given"),
    "dpo, lora": partial(dpo, reference="no adapter", gradient_checkpointing=True, learning_rate=2e-2),
    "dpo, reference's answers first": partial(dpo, precompute_ref_log_probs=True),
    "dpo, reference follows": partial(
        dpo, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5, max_steps=5
    ),
    "kto": kto,
    "kto, lora": partial(kto, reference="no adapter", learning_rate=2e-2),
    "reward": reward,
    "reward, lora": partial(reward, has_adapter=True),
}


def trained(make: Callable[..., Any], folder: Path, arguments: dict[str, Any]) -> list[float]:
    trainer = make(folder, arguments)
    trainer.train()
    return logged(trainer, "loss")


def train_beside_plain_pytorch(folder: Path, case: str) -> None:
    assert_like_plain_pytorch(partial(trained, CASES[case], folder))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_plain_pytorch(run_ranks, assets: Path, case: str) -> None:
    run_ranks(train_beside_plain_pytorch, 2, assets, case, timeout_s=150.0)


def train_with_a_sharded_reference(folder: Path) -> None:
    with trl_runs.fresh_clients(3) as arguments:
        trainer = dpo(folder, arguments)
        trainer.train()
        assert_shares_are_kept(trainer.ref_model.module.parameters())


def test_each_rank_keeps_half_of_the_reference_model(run_ranks, assets: Path) -> None:
    run_ranks(train_with_a_sharded_reference, 2, assets, timeout_s=150.0)
