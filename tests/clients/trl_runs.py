"""TRL's trainers on two CPU ranks: a tokenizer made on the spot, small data, and the same run under torch's DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.clients import clients_common

WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "what", "follows", "comes",
    "before", "after", "?", "is", "it", "not", "a", "number", "good", "bad", "you", "are", "calm", "and", "brief",
]  # fmt: skip
SPECIAL = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "\n"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|> ' + message['role'] + ' \n ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' <|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' <|im_end|>' }}{% endif %}"
    "{{ ' \n ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant \n ' }}{% endif %}"
)


def tokenizer() -> Any:
    """Return a tokenizer with a token a word, and a chat template that marks what the assistant says."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )


def model(**changes: Any) -> Any:
    """Return a tiny Llama that knows the tokenizer's words, alike at every call."""
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
    return clients_common.tiny_llama(vocab_size=len(SPECIAL) + len(WORDS), **{**tokens, **changes})


def lora(**changes: Any) -> Any:
    import peft

    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def numbers(num_rows: int) -> Iterator[tuple[str, str, str]]:
    """Yield a question, its answer, and a wrong one."""
    for row in range(num_rows):
        first = row % 9
        yield f"what comes after {WORDS[first]} ?", f"{WORDS[first + 1]} follows", f"{WORDS[(first + 5) % 9]} follows"


def said(question: str, answer: str | None = None) -> list[dict[str, str]]:
    """Return a conversation; `answer` alone with an empty question."""
    asked = [{"role": "user", "content": question}] if question else []
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    return Dataset.from_list(rows)


def ds_config(stage: int) -> dict[str, Any]:
    """Return a configuration as users of trainers write it, under which every weight is a shard at stage 3."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
    }


@contextlib.contextmanager
def fresh_clients(stage: int | None) -> Iterator[dict[str, Any]]:
    """Have accelerate as a new process finds it; yields a trainer's settings, for plain PyTorch with stage None."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    with clients_common.fresh_clients(is_sharded=stage is not None):
        yield clients_common.trainer_settings(None if stage is None else ds_config(stage))


def settings(folder: str, **changes: Any) -> dict[str, Any]:
    """Return arguments that all trainers take."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "seed": 3,
        **changes,
    }


def assert_like_plain_pytorch(run: Callable[[dict[str, Any]], list[float]], stages: tuple[int, ...] = (2, 3)) -> None:
    """Assert that a trainer's logged losses under each stage are those under DDP, and that they move.

    `run` is given settings for the trainer's arguments.
    """
    with fresh_clients(None) as arguments:
        expected = run(arguments)
    assert len(expected) > 1
    assert max(expected) - min(expected) > 1e-3, f"nothing was learnt: {expected}"
    for stage in stages:
        with fresh_clients(stage) as arguments:
            losses = run(arguments)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5, msg=lambda m, s=stage: f"stage {s}: {m}")
