"""A tiny language model, data made on the spot, and what a process of a client's finds when it has just begun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, LENGTH = 64, 12
TOKENS = torch.arange(3, 19).view(2, 8)


class Run(NamedTuple):
    """What a client saw of a training run; weights by name, whole."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def tiny_llama(**changes: Any) -> Any:
    """Return a Llama for language modelling with 2 blocks, the same on every rank."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LlamaForCausalLM(tiny_config(**changes))


def tiny_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**settings, **changes})


def token_rows(num_rows: int) -> list[dict[str, Tensor]]:
    """Return rows of a text that counts in steps of a row's own: something to learn, other tokens in every row."""
    rows = []
    for row in range(num_rows):
        tokens = (row + (1 + row % 5) * torch.arange(LENGTH)) % (VOCABULARY - 3) + 3
        rows.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens})
    return rows


def device() -> torch.device:
    """Return what clients put their models on: this rank's CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all weights by name; collective where they are kept as shards."""
    from craken import GatheredParameters

    with GatheredParameters(model.parameters()):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def full_bytes(params: Iterable[nn.Parameter]) -> int:
    return sum(param.ds_numel * param.element_size() for param in params)


def assert_shares_are_kept(params: Iterable[nn.Parameter]) -> None:
    """Between steps every rank keeps an equal share of the weights, and what its groups are padded with. Collective."""
    params = list(params)
    assert all(param.numel() == 0 for param in params)
    kept_bytes, whole_bytes = sum(param.ds_tensor.nbytes for param in params), full_bytes(params)
    total = torch.tensor(kept_bytes, device=device())
    torch.distributed.all_reduce(total)
    assert total.item() == whole_bytes
    assert abs(torch.distributed.get_world_size() * kept_bytes - whole_bytes) < 0.05 * whole_bytes


def assert_same(run: Run, expected: Run, *, weights_within: float = 2e-5) -> None:
    """Compare with the same client in plain PyTorch."""
    torch.testing.assert_close(run.losses, expected.losses, rtol=0, atol=1e-5)
    torch.testing.assert_close(run.norms, expected.norms, rtol=1e-4, atol=1e-5)
    assert run.weights.keys() == expected.weights.keys()
    for name, weight in run.weights.items():
        torch.testing.assert_close(
            weight, expected.weights[name], rtol=1e-4, atol=weights_within, msg=lambda m, n=name: f"{n}: {m}"
        )


def ds_config(stage: int, **changes: Any) -> dict[str, Any]:
    """Return a configuration under which every weight is a shard at stage 3."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        **changes,
    }


def plugin_of(stage: int, *, keeps_optimizer: bool = False, **options: Any) -> Any:
    """Return accelerate's plugin; at stage 3 small parameters are sharded, too, as all of tiny models' are."""
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(zero_stage=stage, **options)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = not keeps_optimizer
    return plugin


def accelerator_of(plugin: Any = None, **options: Any) -> Any:
    """Return an Accelerator: DeepSpeed's with a plugin or several by name, torch's DDP without one."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if torch.cuda.is_available():
        return Accelerator(deepspeed_plugin=plugin, **options)
    if plugin is None:
        return Accelerator(cpu=True, **options)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], **options)


def run_parts(accelerator: Any, model: Any) -> Any:
    """Return what `take_steps` takes: accelerator, engine, optimizer, batches and schedule."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loader = torch.utils.data.DataLoader(token_rows(24), batch_size=2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    return accelerator, model, optimizer, list(loader), schedule


def take_steps(parts: Any, first: int, last: int) -> list[float]:
    accelerator, model, optimizer, batches, schedule = parts
    losses = []
    for batch in batches[first:last]:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trainer_settings(config: dict[str, Any] | None) -> dict[str, Any]:
    """Return a trainer's arguments: DeepSpeed's with a config, DDP's without one.

    An empty config leaves it to accelerate's environment.
    """
    from accelerate import PartialState

    if torch.cuda.is_available():
        return {} if config is None else {"deepspeed": config}
    if config is None:
        return {"use_cpu": True, "ddp_backend": "gloo"}
    PartialState(backend="gloo")  # accelerate counts one process on a CPU, unless the backend is named
    return {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}


def logged(trainer: Any, key: str) -> list[float]:
    """Return what a trainer has logged by this name, in order."""
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


@contextlib.contextmanager
def fresh_clients(*, is_sharded: bool) -> Iterator[None]:
    """Have accelerate and transformers as a process finds them that `accelerate launch` has just started."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if is_sharded else "false"
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()


def fresh_environment(**variables: str) -> dict[str, str]:
    """Return an environment for a process of one thread that imports this repository and its drop-in before others."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "dropin"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}
