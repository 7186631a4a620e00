"""accelerate's settings of torch's compiler reach the engine: a compiled model trains as one that is not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.clients.clients_common import (
    ROOT,
    accelerator_of,
    fresh_clients,
    fresh_environment,
    plugin_of,
    tiny_llama,
    token_rows,
)

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")

TINY = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}


def loop(
    stage: int, *, backend: str, is_tied: bool = False, by_regions: bool = False, by_launcher: bool = False
) -> Any:
    """Return the losses, the names in the state dict, and how many graphs the compiler made; an engine's `compile`.

    With `by_launcher`, accelerate is told as `accelerate launch --dynamo_backend` tells it.
    """
    from accelerate.utils import TorchDynamoPlugin

    if by_launcher:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = backend.upper()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with fresh_clients(is_sharded=True):
        named = {} if by_launcher else {"backend": backend}
        plugin = TorchDynamoPlugin(use_regional_compilation=by_regions, **named)
        accelerator = accelerator_of(plugin_of(stage), dynamo_plugin=plugin)
        model = tiny_llama(tie_word_embeddings=is_tied, **TINY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
        loader = torch.utils.data.DataLoader(token_rows(24), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            model.check_integrity()
        names, is_compiled = list(accelerator.unwrap_model(model).state_dict()), model.is_compiled
        accelerator.free_memory()
    return losses, names, torch._dynamo.utils.counters["stats"]["unique_graphs"], is_compiled


def assert_like_uncompiled(run_ranks: Any, stage: int, *, is_tied: bool = False, **compiler: Any) -> None:
    expected, names, num_graphs, is_compiled = run_ranks(loop, 2, stage, is_tied=is_tied, backend="no")[0]
    assert (num_graphs, is_compiled) == (0, False)
    assert max(expected) - min(expected) > 0.1, f"nothing was learnt: {expected}"
    losses, same_names, num_graphs, is_compiled = run_ranks(
        loop, 2, stage, is_tied=is_tied, timeout_s=150.0, **compiler
    )[0]
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    assert same_names == names
    assert num_graphs > 0
    assert is_compiled != compiler.get("by_regions", False)


@pytest.mark.parametrize(("stage", "backend"), [(1, "eager"), (2, "aot_eager"), (3, "eager")])
def test_a_compiled_model_trains_as_one_that_is_not(run_ranks, stage: int, backend: str) -> None:
    assert_like_uncompiled(run_ranks, stage, backend=backend)


def test_a_compiled_model_with_tied_weights_trains_as_one_that_is_not(run_ranks) -> None:
    assert_like_uncompiled(run_ranks, 3, is_tied=True, backend="aot_eager")


def test_a_model_compiled_block_by_block_trains_as_one_that_is_not(run_ranks) -> None:
    assert_like_uncompiled(run_ranks, 3, by_regions=True, backend="aot_eager")


def test_the_launchers_flag_reaches_the_engine(run_ranks) -> None:
    assert_like_uncompiled(run_ranks, 3, by_launcher=True, backend="eager")


def compile_without_optimizer() -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return what a sharded model says without and with the compiler, and whether the engine alone had it loaded."""
    import deepspeed

    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    loads_compiler = "torch._dynamo" in sys.modules
    x = torch.ones(2, 16)
    with torch.no_grad():
        plain = engine(x)
        engine.compile(compile_kwargs={"backend": "eager"})
        engine.compile()
        compiled = engine(x)
    assert engine.is_compiled
    with pytest.raises(NotImplementedError, match="leave them out"):
        engine.compile(schedule=[])
    engine.destroy()
    return plain, compiled, loads_compiler


PROGRAM = """
import torch
from craken.comm import init_distributed, shutdown
from tests.clients.test_accelerate_compiled import compile_without_optimizer
init_distributed(dist_backend="gloo")
plain, compiled, loads_compiler = compile_without_optimizer()
shutdown()
print(torch.equal(plain, compiled), loads_compiler)
"""


def test_the_compiler_is_loaded_when_it_is_asked_for() -> None:
    """In a fresh process: importing it takes seconds, which a model that only answers need not spend."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=fresh_environment(), capture_output=True)
    assert done.stdout.split() == [b"True", b"False"], done.stderr.decode()[-2000:]
