"""Fine-tune a Llama of 7 or 13 billion parameters on one GPU, with optimizer states on the host: speed and memory.

    python benchmarks/large_model.py --billions 7 --micro-batch 4 --accumulation 4
    python benchmarks/large_model.py --billions 13 --ratio 0.5

All parameters train, in bf16 with fp32 masters and Adam's moments (12 bytes a parameter); gradients wait for the step
in 16 bits. `--ratio` keeps the rest of the states on the device. Activations are recomputed in backward. One batch of
random tokens is learnt by heart: the loss must fall. Needs transformers; prints one table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GIB = 2**30
SHAPES = {  # billions -> hidden, layers, heads, intermediate
    0: (256, 4, 4, 688),
    1: (2048, 20, 16, 5504),
    7: (4096, 32, 32, 11008),
    13: (5120, 40, 40, 13824),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=int, default=7, choices=sorted(SHAPES))
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--offload", default="cpu", choices=["none", "cpu", "nvme"])
    parser.add_argument("--offload-param", default="none", choices=["none", "cpu", "nvme"])
    parser.add_argument("--nvme-path", default="/tmp/craken-large-model")
    parser.add_argument("--ratio", type=float, default=1.0, help="share of the states on the host; below 1 at stage 3")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--bucket", type=int, default=500_000_000, help="ceiling of a shard group, in elements")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4, help="2 or more; the first is left out of times and peaks")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    states = {"device": options.offload, "nvme_path": options.nvme_path, "ratio": options.ratio}
    params = {"device": options.offload_param, "nvme_path": options.nvme_path}
    return {
        "train_micro_batch_size_per_gpu": options.micro_batch,
        "gradient_accumulation_steps": options.accumulation,
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "zero_optimization": {
            "stage": options.stage,
            "offload_optimizer": states,
            "offload_param": params,
            "reduce_bucket_size": options.bucket,
            "allgather_bucket_size": options.bucket,
        },
    }


def build(options: argparse.Namespace, device: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, layers, heads, intermediate = SHAPES[options.billions]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def run(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import craken
    from craken.comm import get_accelerator

    accelerator = get_accelerator()
    craken.init_distributed()
    begin = time.perf_counter()
    model = build(options, accelerator.device())
    numel = sum(param.numel() for param in model.parameters())
    built = time.perf_counter()
    engine, *_ = craken.initialize(model=model, model_parameters=model.parameters(), config=config_of(options))
    accelerator.synchronize()
    ready = time.perf_counter()
    tokens = torch.randint(0, 32000, (options.micro_batch, options.length), device=engine.device)
    passes, steps, losses = [], [], []
    for number in range(options.steps):
        if number == 1:
            accelerator.reset_peak_memory_stats()
        first = time.perf_counter()
        for micro in range(options.accumulation):
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            if micro == options.accumulation - 1:
                accelerator.synchronize()
                passes.append(time.perf_counter() - first)
            engine.step()
        accelerator.synchronize()
        steps.append(time.perf_counter() - first - passes[-1])
        losses.append(loss.item())
    pass_s, step_s = statistics.median(passes[1:]), statistics.median(steps[1:])
    ledger = engine.memory_ledger()
    status = Path("/proc/self/status").read_text()
    return {
        "parameters": numel,
        "build_s": built - begin,
        "initialize_s": ready - built,
        "first_step_s": passes[0] + steps[0],
        "forward_backward_s": pass_s,
        "step_s": step_s,
        "tokens_per_s": options.micro_batch * options.length * options.accumulation / (pass_s + step_s),
        "device_peak_gib": accelerator.max_memory_allocated() / GIB,
        "host_peak_gib": int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIB,
        **{f"{place}_states_gib": num_bytes / GIB for place, num_bytes in ledger.items()},
        "losses": [round(loss, 3) for loss in losses],
    }


def main() -> None:
    options = parse()
    result = run(options)
    for key, value in result.items():
        print(f"{key:22}{value:>16,.2f}" if isinstance(value, float) else f"{key:22}{value!s:>16}")
    print(json.dumps({"options": vars(options), **result}))


if __name__ == "__main__":
    main()
