"""The arithmetic of batch sizes: train batch = micro-batch x accumulation steps x data-parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

from craken.config.schema import Config


class BatchSizes(NamedTuple):
    """Samples a step over all ranks, samples a micro-batch on one rank, micro-batches a step."""

    train_batch_size: int
    micro_batch_size: int
    accumulation_steps: int


def resolve_batch(config: Config, data_parallel_size: int) -> BatchSizes:
    """Fill in the batch triple for `data_parallel_size` ranks.

    Any two of the three keys give the third. With `train_batch_size` or `train_micro_batch_size_per_gpu` alone,
    one micro-batch makes a step. ValueError when neither is given, when the three contradict each other, or when a
    division leaves a remainder.
    """
    if data_parallel_size < 1:
        raise ValueError(f"data_parallel_size: expected at least 1 rank, got {data_parallel_size}")
    train = config.train_batch_size
    micro = config.train_micro_batch_size_per_gpu
    steps = config.gradient_accumulation_steps
    if train is None:
        if micro is None:
            raise ValueError(_nothing_given(steps))
        steps = steps or 1
        return BatchSizes(micro * steps * data_parallel_size, micro, steps)
    if micro is not None and steps is not None:
        return _checked(BatchSizes(train, micro, steps), data_parallel_size)
    if micro is not None:
        steps = _divide(
            train, micro, data_parallel_size, "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
        )
        return BatchSizes(train, micro, steps)
    steps = steps or 1
    micro = _divide(train, steps, data_parallel_size, "gradient_accumulation_steps", "train_micro_batch_size_per_gpu")
    return BatchSizes(train, micro, steps)


def _nothing_given(steps: int | None) -> str:
    got = f"only gradient_accumulation_steps = {steps}" if steps else "none of them"
    return (
        "train_batch_size, train_micro_batch_size_per_gpu: expected at least one of the two, got "
        f'{got}; write for example "train_micro_batch_size_per_gpu": 1'
    )


def _checked(sizes: BatchSizes, ranks: int) -> BatchSizes:
    product = sizes.micro_batch_size * sizes.accumulation_steps * ranks
    if sizes.train_batch_size != product:
        remedy = f"write {product}, or leave one of the three keys out"
        if sizes.train_batch_size * ranks == product:
            remedy += (
                "; accelerate counts 1 process on CPUs, unless "
                "Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend='gloo')]) names the backend"
            )
        raise ValueError(
            f"train_batch_size: expected train_micro_batch_size_per_gpu {sizes.micro_batch_size} x "
            f"gradient_accumulation_steps {sizes.accumulation_steps} x {ranks} data-parallel rank"
            f"{'s' if ranks > 1 else ''} = {product}, got {sizes.train_batch_size}; {remedy}"
        )
    return sizes


def _divide(train: int, given: int, ranks: int, given_key: str, missing_key: str) -> int:
    """Return the third number of the triple, `train` / (`given` x `ranks`)."""
    unit = given * ranks
    if train % unit:
        below = train // unit * unit
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        raise ValueError(
            f"train_batch_size: expected a multiple of {given_key} {given} x {ranks} data-parallel "
            f"rank{'s' if ranks > 1 else ''} = {unit} (the rest is {missing_key}), got {train}; write {near}"
        )
    return train // unit
