"""A user's script under `accelerate launch`: trains a tiny model, writes what it saw as JSON. It names no setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers import AutoModelForCausalLM

LENGTH = 12


def rows(num_rows: int) -> list[dict[str, torch.Tensor]]:
    tokens = [(row + (1 + row % 5) * torch.arange(LENGTH)) % 61 + 3 for row in range(num_rows)]
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(folder: Path, output: Path) -> None:
    gloo = InitProcessGroupKwargs(backend="gloo")  # the one line that a machine without accelerators needs
    accelerator = Accelerator(kwargs_handlers=[gloo])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    facts: dict[str, Any] = {"is_born_sharded": all(param.shape == (0,) for param in model.parameters())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(rows(64), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.gather(loss.detach().float()).mean()))
    accelerator.save_state(str(output.with_suffix("")))
    try:
        state = accelerator.get_state_dict(model)
        facts["saved"] = sorted(state) if state is not None else None
    except ValueError as error:
        facts["saved"] = str(error)
    if accelerator.is_main_process:
        shards = [param.ds_tensor for param in model.parameters() if param.numel() == 0]  # small ones stay whole
        facts |= {
            "losses": losses,
            "engine": f"{type(model).__module__}.{type(model).__name__}",
            "num_processes": accelerator.num_processes,
            "stage": model.zero_optimization_stage(),
            "accumulation": model.gradient_accumulation_steps(),
            "clipping": model.gradient_clipping(),
            "steps": model.global_steps,
            "loss_scale": model.loss_scale,
            "dtypes": sorted({str(param.dtype) for param in model.parameters()}),
            "optimizer": type(optimizer.optimizer.optimizer).__name__,
            "held": model.memory_ledger(),
            "offload_param": model.config["zero_optimization"]["offload_param"]["device"],
            "shards_on": sorted({shard.device.type for shard in shards}),
            "shard_bytes": sum(shard.nbytes for shard in shards),
        }
        output.write_text(json.dumps(facts))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
