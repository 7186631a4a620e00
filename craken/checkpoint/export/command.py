"""`craken export`: a checkpoint as a Hugging Face model, whatever stage and number of ranks saved it, without GPUs."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.export.weight_files import Written, parse_size
from craken.checkpoint.export.write import Changes, LinearLayers, Planned, check_target, plan_export, write_export
from craken.checkpoint.inspect_command import human_bytes
from craken.checkpoint.place import Place, host_path
from craken.log import logger

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EXAMPLES = """examples:
  craken export runs/notes model --dtype bf16
  craken export out/checkpoint-500 model --merge-adapter out/checkpoint-500 --base meta-llama-folder
  craken export runs/notes small --quantise int4 --dtype bf16
"""


def main(words: Sequence[str], linear_layers: LinearLayers | None = None) -> int:
    """Run `craken export`; return the exit code: 1 when the checkpoint is damaged, 2 when it cannot be done.

    `linear_layers` tells a model's linear layers from the folder of its config.json; quantising asks it.
    """
    asked = _parser().parse_args(words)
    changes = Changes(_DTYPES.get(asked.dtype), asked.merge_adapter, asked.base, asked.quantise, linear_layers)
    begin_s = time.monotonic()
    try:
        check_target(asked.out)
        planned = plan_export(asked.checkpoint, changes, tag=asked.tag, files=asked.model_files)
        written = _write(planned, asked.out, asked.max_shard_size)
    except (ValueError, OSError) as error:
        logger.error(str(error))
        return 1 if isinstance(error, CheckpointDamaged) else 2
    _report(planned, written, asked.out, time.monotonic() - begin_s)
    return 0


def _write(planned: Planned, out: Path, max_shard_bytes: int) -> Written:
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("exporting", total=planned.num_bytes)
        return write_export(
            planned,
            out,
            max_shard_size=max_shard_bytes,
            on_bytes=lambda num_bytes: progress.advance(task, num_bytes),
        )


def _report(planned: Planned, written: Written, out: Path, elapsed_s: float) -> None:
    if planned.model_files is None:
        run = _interrupted_run(planned.source)
        finish = f"finish the run, which writes one (craken train --resume {run}), or " if run else ""
        logger.warning(
            f"no config.json was found near {planned.source}: {out} holds weights only; for a model that "
            f"from_pretrained loads {finish}give --model-files FOLDER"
        )
    weights = [name for name in written.files if name.endswith(".safetensors")]
    Console(highlight=False).print(
        f"{out}: {written.num_tensors} tensors, {human_bytes(written.num_bytes)} in {len(weights)} "
        f"file{'s' if len(weights) > 1 else ''}, {planned.dtype}, from {planned.source} in {elapsed_s:.1f} s"
        + (f"; configuration from {planned.model_files}" if planned.model_files else ""),
        soft_wrap=True,
        markup=False,
    )


def _interrupted_run(checkpoint: Place) -> Path | None:
    """Return the output folder of the `craken train` that saved RUN/checkpoints/TAG, which has no model yet."""
    if not isinstance(checkpoint, Path):
        return None
    run = checkpoint.resolve().parent.parent
    return run if (run / "run.json").is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="craken export",
        description="Write a checkpoint as a Hugging Face model: safetensors, configuration, tokenizer.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EXAMPLES,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the folder with `latest` in it, or one tag's folder")
    parser.add_argument("out", metavar="OUT", type=_folder, help="a new or empty folder")
    parser.add_argument("--tag", help="a checkpoint other than the latest, such as global_step100")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="of the weights (as they are stored: fp32 masters)")
    parser.add_argument("--max-shard-size", type=_size, default=parse_size("5GB"), metavar="SIZE", help="a file (5GB)")
    parser.add_argument(
        "--model-files", type=_folder, metavar="DIR", help="with config.json, tokenizer (looked for near CKPT)"
    )
    parser.add_argument(
        "--merge-adapter", type=_folder, metavar="DIR", help="a LoRA adapter that PEFT wrote, to add in"
    )
    parser.add_argument("--base", type=_folder, metavar="DIR", help="the base model, if CKPT has no frozen weights")
    parser.add_argument(
        "--quantise",
        "--quantize",
        choices=("int8", "int4"),
        help="linear layers as bitsandbytes keeps them: int8 by rows, or NF4; the rest in --dtype",
    )
    return parser


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _folder(text: str) -> Path:
    try:
        return host_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
