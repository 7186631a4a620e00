"""Everything that can be done and checked before a rank starts: configuration, model, text, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import craken
from craken.config import BatchSizes
from craken.train import huggingface, token_cache
from craken.train.arguments import Options
from craken.train.presets import PRESETS
from craken.train.settings import engine_config, kept_batch, with_batch
from craken.train.token_cache import Report, TokenCache
from craken.train.windows import Windows


@dataclass(frozen=True)
class Plan:
    """A checked run: its flags, its configuration for the library, its batch sizes and its tokens."""

    options: Options
    config: dict[str, Any]
    batch: BatchSizes
    cache: TokenCache
    remark: str = ""  # how the flags had to give way to the run that is gone on with

    @property
    def tokens_per_step(self) -> int:
        return self.batch.train_batch_size * self.options.seq_len


def prepare(options: Options, *, num_ranks: int, report: Report) -> Plan:
    """Check the run and tokenise its text; ValueError with one clear message on anything that cannot work."""
    config = engine_config(options)
    try:
        given = craken.check_config(config, num_ranks)
    except NotImplementedError as error:  # says what to use instead
        raise ValueError(str(error)) from error
    batch = kept_batch(given, options.kept_batch_size or given.train_batch_size, num_ranks)
    remark = ""
    if batch != given:
        config = with_batch(config, batch)
        remark = (
            f"a step keeps its {batch.train_batch_size} sequences: accumulation {batch.accumulation_steps} instead of "
            f"{given.accumulation_steps}; --accumulation {given.accumulation_steps} makes it {given.train_batch_size}"
        )
    source = huggingface.tokenizer_source(options.model, options.vocab_size)
    cache = token_cache.prepare(options.data, options.cache, source, report=report)
    plan = Plan(options, config, batch, cache, remark)
    _check_size(plan, num_ranks)
    if options.model not in PRESETS:
        vocab_size = cache.meta.vocab_size
        huggingface.build_model(options.model, vocab_size=vocab_size, seq_len=options.seq_len, device="meta")
    return plan


def _check_size(plan: Plan, num_ranks: int) -> None:
    options, batch = plan.options, plan.batch
    source = "the standard library" if options.data is None else f"--data {options.data}"
    num_windows = len(Windows(plan.cache.train(), options.seq_len))
    if num_windows < batch.train_batch_size:
        raise ValueError(
            f"{source} is smaller than one batch: {plan.cache.meta.train_tokens} tokens make {num_windows} "
            f"sequences of {options.seq_len}, a step takes {batch.train_batch_size} (micro-batch "
            f"{batch.micro_batch_size} x accumulation {batch.accumulation_steps} x {num_ranks} ranks); give more text "
            "or lower --seq-len, --micro-batch or --accumulation"
        )
    num_held_out = len(Windows(plan.cache.held_out(), options.seq_len))
    if num_held_out < num_ranks:
        raise ValueError(
            f"{source}: the held-out text makes {num_held_out} sequences of {options.seq_len} tokens, validation needs "
            f"one for each of {num_ranks} ranks; give more text or lower --seq-len"
        )
