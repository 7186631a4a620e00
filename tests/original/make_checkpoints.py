"""Makes the test files: checkpoints that the original writes on 2 CPU ranks, and what it does in the steps after them.

    python tests/original/make_checkpoints.py OUT [CASE ...]

Run by hand, with a C++ compiler and a Python that has the original (`deepspeed`) in the release that the case names.
Writes OUT/CASE.tar.xz, the checkpoint's folder without the scripts put beside it, and OUT/CASE.json: learning rate,
loss scale and counts when it was saved, weights and optimizer states as the original's own accessors give them (fp32,
base64), the steps' losses.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.ranks import is_rank, run_on_ranks
from tests.original.cases import CASES, RANKS, SAVED_AT, STEPS_AFTER, Case, Model, config_of, groups_of, train


def train_and_save(case: Case, folder: str) -> dict[str, Any]:
    """Run one rank: train, save, tell what there is, train on."""
    import deepspeed
    import numpy as np
    import torch

    from tests.original import kernels
    from tests.original.cases import scheduler_of

    kernels.install()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(7)
    model = Model()
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=model,
        model_parameters=groups_of(case, model),
        config=config_of(case, case.stage, RANKS),
        lr_scheduler=scheduler_of(case),
    )
    train(engine, case, range(SAVED_AT), rank, RANKS)
    client_state = {"epoch": 2, "seen": torch.arange(3), "pair": (1, "a"), "best": np.float64(0.25), "at": np.arange(4)}
    engine.save_checkpoint(folder, client_state=client_state)
    told = {
        "lr": scheduler.get_last_lr(),
        "loss_scale": float(getattr(optimizer, "cur_scale", getattr(optimizer, "loss_scale", None)) or 1.0),
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "num_forwards": float(model.num_forwards),
        "tensors": tensors_of(engine, model, case),
    }
    losses = torch.tensor(train(engine, case, range(SAVED_AT, SAVED_AT + STEPS_AFTER), rank, RANKS))
    torch.distributed.all_reduce(losses)
    told["losses"] = (losses / RANKS).tolist()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return told


def tensors_of(engine: Any, model: Model, case: Case) -> dict[str, str]:
    """Collective: return `weight:NAME`, `exp_avg:NAME`, ... -> the full fp32 tensor in base64."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, torch.Tensor] = {}
    if case.zero.get("round_robin_gradients"):
        return {}  # its accessors give other parameters' values then
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if case.stage == 0 and case.precision == "fp32":
            state = engine.optimizer.state[param]
            found[f"weight:{name}"] = param.detach()
            found.update({f"{key}:{name}": state[key] for key in case.states})
        else:
            found[f"weight:{name}"] = safe_get_full_fp32_param(param)
            # at stages 1 and 2 its accessor finds no states but those that were loaded
            for key in case.states if case.stage in (0, 3) else ():
                found[f"{key}:{name}"] = safe_get_full_optimizer_state(param, key)
    return {
        name: base64.b64encode(value.detach().float().contiguous().numpy().tobytes()).decode()
        for name, value in found.items()
        if value is not None
    }


def make(name: str, out: Path) -> None:
    """Make one case's two files."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "saved"
        command = [sys.executable, __file__, str(folder), name]
        told = run_on_ranks(command, RANKS)[0]
        if case.is_universal:
            folder = convert(folder, Path(scratch) / "universal")
        (out / f"{name}.json").write_text(json.dumps(told, indent=0) + "\n")
        pack(folder, out / f"{name}.tar.xz")


def convert(folder: Path, target: Path) -> Path:
    """Turn a checkpoint into the original's universal form with its own tool; return the new folder."""
    tag = f"global_step{SAVED_AT}"
    module = "deepspeed.checkpoint.ds_to_universal"
    options = ["--input_folder", str(folder / tag), "--output_folder", str(target / f"{tag}_universal")]
    command = [sys.executable, "-m", module, *options, "--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*command, "--inject_missing_state"], check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    return target


def pack(folder: Path, archive: Path) -> None:
    """Write `folder` as a tar that depends on nothing but the files' names and bytes; scripts stay out."""
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".py":
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                data = path.read_bytes()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all of this release when none is named"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if is_rank():
        print(json.dumps(train_and_save(CASES[options.cases[0]], str(options.out))))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    installed = version("deepspeed")
    for name in options.cases or [name for name, case in CASES.items() if case.release == installed]:
        make(name, options.out)
        print(f"{name}: {(options.out / f'{name}.tar.xz').stat().st_size} bytes", flush=True)


if __name__ == "__main__":
    main()
