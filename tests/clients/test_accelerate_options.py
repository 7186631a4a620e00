"""What accelerate hands on beside a stage: leaf modules, what a state leaves out, where it goes, two models trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients.adapters import adapted
from tests.clients.clients_common import (
    Run,
    accelerator_of,
    assert_same,
    fresh_clients,
    plugin_of,
    run_parts,
    take_steps,
    tiny_llama,
    whole_weights,
)

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")

NONE = 1e9  # accelerate has gradients clipped to a norm of 1, unless it is told another
EXPERTS = "MixtralSparseMoeBlock"


def mean_losses(accelerator: Any, losses: list[float]) -> list[float]:
    return accelerator.reduce(torch.tensor(losses, device=accelerator.device), "mean").tolist()


# --- leaf modules -----------------------------------------------------------------------------------------------------


def tiny_mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 1}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MixtralForCausalLM(MixtralConfig(**sizes, **heads, max_position_embeddings=32))


def mixture(is_sharded: bool) -> Run:
    """Train a mixture of experts whose blocks accelerate has been told to treat as one."""
    from deepspeed.utils import get_z3_leaf_modules

    with fresh_clients(is_sharded=is_sharded):
        plugin = plugin_of(3, gradient_clipping=NONE, transformer_moe_cls_names=EXPERTS) if is_sharded else None
        accelerator = accelerator_of(plugin)
        model = tiny_mixtral()
        parts = run_parts(accelerator, model)
        leaves = [type(leaf).__name__ for leaf in get_z3_leaf_modules(model)]
        assert leaves == ([EXPERTS] * 2 if is_sharded else [])
        losses = mean_losses(accelerator, take_steps(parts, 0, 5))
        run = Run(losses, [], whole_weights(model))
        accelerator.free_memory()
        return run


def test_blocks_of_experts_that_the_plugin_names_are_leaves(run_ranks) -> None:
    run = run_ranks(mixture, 2, True)[0]
    assert_same(run, run_ranks(mixture, 2, False)[0])
    assert max(run.losses) - min(run.losses) > 1e-2


# --- states -----------------------------------------------------------------------------------------------------------


def adapters_saved_and_loaded(folder: str, stage: int) -> tuple[int, int]:
    """Save a state without the frozen weights, load it into a run that has just begun; returns bytes of both kinds."""

    def begun() -> Any:
        plugin = plugin_of(stage)
        plugin.deepspeed_config["checkpoint"] = {"use_node_local_storage": True}  # as `save_on_each_node` sets it
        return run_parts(accelerator_of(plugin), adapted("lora"))

    with fresh_clients(is_sharded=True):
        parts = begun()
        take_steps(parts, 0, 2)
        parts[0].save_state(f"{folder}/trained", exclude_frozen_parameters=True)
        parts[0].save_state(f"{folder}/all")
        expected = take_steps(parts, 2, 5)
        parts[0].free_memory()
    with fresh_clients(is_sharded=True):
        parts = begun()
        parts[0].load_state(f"{folder}/trained", load_module_strict=False)
        assert take_steps(parts, 2, 5) == expected
        parts[0].free_memory()
    files = {kind: list((Path(folder) / kind / "pytorch_model").rglob("*")) for kind in ("trained", "all")}
    return tuple(sum(path.stat().st_size for path in files[kind]) for kind in ("trained", "all"))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_state_without_frozen_weights_goes_on_as_if_nothing_had_happened(run_ranks, tmp_path: Path, stage) -> None:
    trained, everything = run_ranks(adapters_saved_and_loaded, 2, str(tmp_path), stage)[0]
    frozen = sum(param.nbytes for param in tiny_llama().parameters())
    assert everything - trained == pytest.approx(frozen, rel=0.2)


# --- two models -------------------------------------------------------------------------------------------------------


def both_trained(is_sharded: bool) -> tuple[Run, Run]:
    """Train two models by turns, each with an accelerator and a stage of its own."""
    from accelerate import Accelerator

    with fresh_clients(is_sharded=is_sharded):
        plugins = {name: plugin_of(stage, gradient_clipping=NONE) for name, stage in (("first", 2), ("second", 3))}
        accelerator = accelerator_of(plugins if is_sharded else None)
        models = [tiny_llama(), tiny_llama(intermediate_size=40)]
        first = run_parts(accelerator, models[0])
        if is_sharded:
            accelerator.state.select_deepspeed_plugin("second")
        second = run_parts(Accelerator() if is_sharded else accelerator, models[1])
        losses: dict[int, list[float]] = {0: [], 1: []}
        for step in range(5):
            for index, parts in enumerate((first, second)):
                losses[index] += take_steps(parts, step, step + 1)
        runs = [Run(mean_losses(accelerator, losses[i]), [], whole_weights(models[i])) for i in (0, 1)]
        for parts in (first, second):
            parts[0].free_memory()
        return runs[0], runs[1]


def test_two_models_are_trained_by_turns(run_ranks) -> None:
    for run, expected in zip(run_ranks(both_trained, 2, True)[0], run_ranks(both_trained, 2, False)[0], strict=True):
        assert_same(run, expected)
