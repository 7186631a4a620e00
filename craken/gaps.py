"""DeepSpeed's names for what is not built yet: asking for one says so, and what to do instead."""

from __future__ import annotations

from typing import Any, NoReturn


class GapError(NotImplementedError, ImportError):
    """A name that craken does not have yet; `hasattr` raises it too.

    Of an AttributeError, `from deepspeed import NAME` would drop the text.
    """


_PARALLEL = "only data parallelism works yet; leave {} out"
_INSTEAD = {
    "tp_model_init": _PARALLEL.format("tensor parallelism (tensor_parallel, autotp_size)"),
    "PipelineModule": _PARALLEL.format("pipeline parallelism"),
    "init_inference": "initialize(model=..., config=...) without an optimizer runs a model at ZeRO stage 3",
    "estimate_zero3_model_states_mem_needs_all_live": "18 bytes a parameter in bf16 with fp32 sums, over all ranks",
    "estimate_zero3_model_states_mem_needs_all_cold": "18 bytes a parameter in bf16 with fp32 sums, over all ranks",
}


def missing(name: str) -> Any:
    """Serve as a module's `__getattr__`."""
    if name in _INSTEAD:
        raise GapError(f"deepspeed's {name} is not there yet: {_INSTEAD[name]}")
    raise AttributeError(f"deepspeed (craken's drop-in) has no {name!r} here")


def no_sequence_parallelism(*arguments: Any, **named: Any) -> NoReturn:
    """Stand for every call that sets up sequence parallelism."""
    raise NotImplementedError(_PARALLEL.format("sequence parallelism (sequence_parallel_size, Ulysses)"))


class NoSequenceParallelism:
    """Stands for the classes through which clients set up sequence parallelism."""

    register_with_transformers = staticmethod(no_sequence_parallelism)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        no_sequence_parallelism()
