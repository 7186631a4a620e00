"""The adapters of PEFT on a small language model, and the losses that plain PyTorch gives it on all ranks' data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.clients.clients_common import LENGTH, device, tiny_llama

NUM_TOKENS, LR = 36, 1e-2  # as many as the smallest vocabulary has


def adapted(method: str, base: Any = None, *, seed: int = 11) -> Any:
    """Return a model with adapters of one method, alike at every call; `base` is a tiny Llama unless given."""
    import peft

    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    of_method: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(**lora),
        "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
        "modules_to_save": lambda: peft.LoraConfig(**lora, modules_to_save=["lm_head", "embed_tokens"]),
        "adalora": lambda: peft.AdaLoraConfig(
            **{**lora, "target_modules": ["q_proj", "v_proj"]}, init_r=6, target_r=3, tinit=1, tfinal=1, total_step=6
        ),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    }
    base = tiny_llama() if base is None else base
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(base, of_method[method]())
        for name, param in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(param, std=0.02)  # zeros: nothing would reach lora_A
    return model


def tokens(step: int, rank: int) -> Tensor:
    """Return [2, LENGTH] token ids that only depend on the step and the rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, NUM_TOKENS, (2, LENGTH), generator=generator).to(device())


def loss_of(model: Any, step: int, rank: int) -> Tensor:
    """The language model's loss on what `tokens` gives."""
    batch = tokens(step, rank)
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def logits_of(model: Any) -> Tensor:
    """Return the logits for one batch of tokens, without a graph."""
    with torch.no_grad():
        return model(input_ids=tokens(9, 0), use_cache=False).logits.float()


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def plain_losses(
    model: Any, num_steps: int, world_size: int, after_backward: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train on the batches of all ranks at once; returns the mean loss of each step."""
    optimizer = torch.optim.AdamW(trained(model), lr=LR)
    losses = []
    for step in range(num_steps):
        loss = torch.stack([loss_of(model, step, rank) for rank in range(world_size)]).mean()
        loss.backward()
        optimizer.step()
        after_backward(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mean_over_ranks(loss: Tensor) -> float:
    """Return the mean of a number over the ranks. Collective."""
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()
