"""TRL's callbacks under stages 2 and 3: what they keep, say and show is what they do in plain PyTorch."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.clients import trl_runs
from tests.clients.clients_common import logged
from tests.clients.trl_runs import dataset, numbers, settings

pytest.importorskip("trl", reason="needs trl (the hf extra)")
pytestmark = pytest.mark.clients


def sft(folder: str, arguments: dict[str, Any], **changes: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": f"{question} {answer} <|im_end|>"} for question, answer, _ in numbers(32)]
    asked = [{"prompt": f"{question} ", "completion": answer} for question, answer, _ in numbers(5)]
    args = SFTConfig(
        **settings(folder, **{"gradient_checkpointing": False, "max_length": 64, "learning_rate": 2e-2}, **arguments)
    )
    return SFTTrainer(
        model=trl_runs.model(),
        args=args,
        train_dataset=dataset(rows),
        eval_dataset=dataset(asked),
        processing_class=trl_runs.tokenizer(),
        **changes,
    )


def under(run: Callable[[str, dict[str, Any]], Any], folder: str, stage: int | None) -> Any:
    with trl_runs.fresh_clients(stage) as arguments:
        return run(f"{folder}/{stage}", arguments)


# --- an average of the weights ----------------------------------------------------------------------------------------


def average(folder: str, arguments: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Return the average of the weights that TRL keeps, as it is on this rank."""
    from trl import BEMACallback

    callback = BEMACallback(**options)
    sft(folder, arguments, callbacks=[callback]).train()
    return dict(callback.running_model.state_dict())


@pytest.mark.parametrize("options", [{"update_freq": 1}, {"update_freq": 1, "update_after": 2}])
def test_an_average_of_the_weights_is_that_of_plain_pytorch(run_ranks, tmp_path: Path, options) -> None:
    """At stage 3 torch refuses what the callback copies outside of forwards: weights that are shards."""
    from safetensors.torch import load_file

    run = partial(average, **options)
    expected = run_ranks(under, 2, run, str(tmp_path), None, timeout_s=120.0)[0]
    for rank, averaged in enumerate(run_ranks(under, 2, run, str(tmp_path), 2, timeout_s=120.0)):
        assert averaged.keys() == expected.keys()
        for name, value in averaged.items():
            torch.testing.assert_close(
                value, expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name, r=rank: f"rank {r}, {n}: {m}"
            )
    saved = load_file(tmp_path / "2" / "bema" / "model.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in saved.items())


# --- what the model says between steps --------------------------------------------------------------------------------


def completions(folder: str, arguments: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return (step, prompt, completion) of all ranks' prompts, as TRL would hand it to a tracker."""
    from transformers import GenerationConfig
    from trl import LogCompletionsCallback

    trainer = sft(folder, arguments)
    saying = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=3)
    callback = LogCompletionsCallback(trainer, saying, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    return callback.table


def test_completions_are_those_of_plain_pytorch(run_ranks, tmp_path: Path) -> None:
    """Five prompts for two ranks: one of them generates longer than the other."""
    expected, nothing = run_ranks(under, 2, completions, str(tmp_path), None, timeout_s=120.0)
    assert nothing == []
    assert {row[:2] for row in expected} == {
        (str(step), f"{asked} ") for step in range(1, 5) for asked, *_ in numbers(5)
    }
    assert len({row[2] for row in expected}) > 1, "the model said the same all along"
    for stage in (2, 3):
        assert run_ranks(under, 2, completions, str(tmp_path), stage, timeout_s=120.0)[0] == expected


# --- progress ---------------------------------------------------------------------------------------------------------


def progress(folder: str, arguments: dict[str, Any]) -> tuple[list[float], str]:
    """Return the losses, and the last picture of TRL's progress bars."""
    from rich.console import Console
    from trl import RichProgressCallback

    pictures = []

    class Seen(RichProgressCallback):
        """Its pictures as text."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            super().on_log(args, state, control, logs=logs, **kwargs)
            if self.training_status is not None:
                console = Console(file=io.StringIO(), width=400)
                console.print(self.training_status.renderable.text)
                pictures.append(console.file.getvalue())

    trainer = sft(folder, {"eval_strategy": "steps", "eval_steps": 2, **arguments}, callbacks=[Seen()])
    trainer.train()
    return [*logged(trainer, "loss"), *logged(trainer, "eval_loss")], "".join(pictures)


def test_progress_shows_the_losses(run_ranks, tmp_path: Path) -> None:
    expected, _ = run_ranks(under, 2, progress, str(tmp_path), None, timeout_s=120.0)[0]
    for stage in (2, 3):
        (losses, pictures), (_, nothing) = run_ranks(under, 2, progress, str(tmp_path), stage, timeout_s=120.0)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
        assert all(f"{loss:.3f}" in pictures for loss in losses)
        assert nothing == ""
