"""The flags of `craken train`: parsed, completed from the preset or from an earlier run, and checked one by one."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from craken.checkpoint import Place
from craken.checkpoint.place import host_path
from craken.train.earlier import AUTO, FLAGS, absolute, check_unused, output_at, place_at, with_earlier
from craken.train.presets import PRESETS, Preset

DEFAULT_PROMPT = """\
import unittest


class TestSort(unittest.TestCase):
    def test_sorted(self):
        self.assertEqual("""
BATCH_SIZE = "train_batch_size"  # beside the flags in their file: sequences a step, over all ranks
KEPT_CHECKPOINTS = 2
CHECKPOINTS = "checkpoints"  # the folder in the output
PATH_FLAGS = frozenset({"data", "config", "cache", "checkpoints"})
PRECISIONS = ("bf16", "fp16", "fp32")

EXAMPLES = """\
examples:
  craken train                                train the 10 M parameter model on Python's own library, ZeRO-2, bf16
  craken train --zero 1 --minutes 2           the same with ZeRO-1, for two minutes
  craken train --data ~/notes --output runs/notes
  craken train --model tiny --steps 20 --ranks 2
  craken train --config configs/ds_zero2_config.json
  craken train --resume runs/notes            go on where a run was stopped
  craken train --output runs/notes --resume auto
                                              the same command begins the run, and goes on with it after a stop
  craken train --checkpoints s3://bucket/notes --resume auto
                                              the same on a machine that has nothing of the run yet
  deepspeed --num_gpus=4 -m craken.train --zero 2
                                              ranks started by a launcher (`deepspeed`, `craken launch`, torchrun)
"""


class Resume(Enum):
    """Whether a run goes on with an earlier one in its folder."""

    NEVER = auto()
    ALWAYS = auto()
    IF_POSSIBLE = auto()  # else it begins: `--resume auto`


@dataclass(frozen=True)
class Options:
    """One run, complete: what the flags say, what the preset says where they are silent. `given` holds the flags."""

    model: str
    data: Path | None
    config: Path | None
    zero: int
    precision: str
    vocab_size: int
    seq_len: int
    micro_batch_size: int
    accumulation_steps: int
    lr: float
    steps: int
    minutes: float | None
    eval_every: int
    eval_windows: int
    save_every: int
    seed: int
    ranks: int | None
    output: Path
    checkpoints: Place
    cache: Path
    prompt: str
    resume: Resume
    keep_last: int
    kept_batch_size: int | None  # sequences a step of the run that is gone on with, where --accumulation is not given
    given: Mapping[str, Any]

    @property
    def preset(self) -> Preset | None:
        return PRESETS.get(self.model)


def parse(argv: list[str]) -> dict[str, Any]:
    """Return the flags that were given, by name; exits with code 2 and one line on a flag that does not exist."""
    return {name: value for name, value in vars(build_parser().parse_args(argv)).items() if value is not None}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `craken train`; no flag has a default of its own, so that `parse` tells what was given."""
    parser = argparse.ArgumentParser(
        prog="craken train",
        description="Train a causal language model on text with ZeRO, on all accelerators found or on 2 CPU processes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    _add_what(parser.add_argument_group("what to train, and on what"))
    _add_how(parser.add_argument_group("how"))
    _add_how_long(parser.add_argument_group("how long, and how often to look"))
    _add_output(parser.add_argument_group("where to, and going on"))
    return parser


def _add_what(group: argparse._ArgumentGroup) -> None:
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    group.add_argument(
        "--model",
        metavar="NAME|PATH",
        help=f"a preset ({presets}), a model's config.json, or a folder with config.json and weights (default: small)",
    )
    group.add_argument(
        "--data",
        metavar="PATH",
        help="a folder or a file of text (default: the Python standard library's sources and docs)",
    )
    group.add_argument("--vocab-size", type=_whole(257), metavar="N", help="tokens to learn (default: the preset's)")
    group.add_argument(
        "--prompt", metavar="TEXT", help="what the trained model is asked to complete (default: some code)"
    )


def _add_how(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage (default: 2, or the --config file's)")
    group.add_argument(
        "--config",
        metavar="JSON",
        help="a DeepSpeed configuration; flags given beside it win, what it leaves out is filled in",
    )
    group.add_argument("--precision", choices=PRECISIONS, help="compute dtype (default: bf16, or the --config file's)")
    group.add_argument(
        "--ranks", type=_whole(1), metavar="N", help="processes (default: one an accelerator, or 2 on CPU)"
    )
    group.add_argument("--seq-len", type=_whole(2), metavar="N", help="tokens in a sequence (default: the preset's)")
    group.add_argument(
        "--micro-batch", type=_whole(1), metavar="N", help="sequences a rank and pass (default: the preset's)"
    )
    group.add_argument(
        "--accumulation",
        type=_whole(1),
        metavar="N",
        help="passes a step (default: 8; going on: what keeps a step's size)",
    )
    group.add_argument(
        "--lr", type=_positive, metavar="RATE", help="peak learning rate of the optimizer (default: the preset's)"
    )
    group.add_argument("--seed", type=_whole(0), metavar="N", help="of weights and order of the data (default: 0)")


def _add_how_long(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--steps", type=_whole(1), metavar="N", help="optimizer steps (default: the preset's)")
    group.add_argument(
        "--minutes", type=_positive, metavar="M", help="stop after M minutes of training if steps take longer"
    )
    group.add_argument("--eval-every", type=_whole(1), metavar="N", help="steps between validations (default: a tenth)")
    group.add_argument(
        "--eval-windows", type=_whole(1), metavar="N", help="held-out sequences to validate on (default: 128)"
    )
    group.add_argument(
        "--save-every",
        type=_whole(0),
        metavar="N",
        help="steps between checkpoints; 0: at the end only (default: a quarter)",
    )
    group.add_argument(
        "--keep-last", type=_whole(0), metavar="N", help="checkpoints to keep; 0: all (default: 2, or the --config's)"
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", metavar="DIR", help="folder for everything the run makes (default: runs/MODEL-zeroN)"
    )
    group.add_argument(
        "--checkpoints",
        metavar="DIR|URL",
        help="where checkpoints go: another folder, or a store that fsspec reaches (default: in the output)",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR|URL|auto",
        help="go on with the run in DIR (default: in --output) or with checkpoints in DIR or at URL; `auto`: with "
        "the run in --output or --checkpoints from its newest checkpoint that is whole, or begin if there is none",
    )
    group.add_argument(
        "--cache", metavar="DIR", help="where tokenised text is kept (default: .craken_cache beside the output)"
    )


def resolve(given: Mapping[str, Any], *, has_accelerator: bool) -> Options:
    """Complete the given flags; ValueError when they contradict each other or name what is not there."""
    given = dict(given)
    folder = given.pop("resume", None)
    given.pop("local_rank", None)
    resume = Resume.NEVER if folder is None else Resume.IF_POSSIBLE if folder == AUTO else Resume.ALWAYS
    adjusts_batch = "accumulation" not in given
    if resume is not Resume.NEVER:
        zero = given.get("zero", _stage_in(_read_config(given.get("config"))))
        given = with_earlier(given, folder, default_output=_default_output(given.get("model", "small"), zero))
    batch_size = given.pop(BATCH_SIZE, None)
    config = _read_config(given.get("config"))
    model = given.get("model", "small")
    preset = PRESETS.get(model, PRESETS["small"])
    zero = given.get("zero", _stage_in(config))
    output = output_at(given["output"]) if "output" in given else _free_folder(_default_output(model, zero))
    checkpoints = place_at(given.get("checkpoints", output / CHECKPOINTS))
    if resume is Resume.NEVER:
        check_unused(output, checkpoints)
    steps = given.get("steps", preset.steps)
    return Options(
        model=model,
        data=Path(given["data"]).expanduser() if "data" in given else None,
        config=Path(given["config"]) if "config" in given else None,
        zero=zero,
        precision=given.get("precision", _precision_in(config)),
        vocab_size=given.get("vocab_size", preset.vocab_size),
        seq_len=given.get("seq_len", preset.seq_len),
        micro_batch_size=given.get(
            "micro_batch", preset.micro_batch_size * (preset.accelerator_factor if has_accelerator else 1)
        ),
        accumulation_steps=given.get("accumulation", 8),
        lr=given.get("lr", preset.lr),
        steps=steps,
        minutes=given.get("minutes"),
        eval_every=given.get("eval_every", max(1, math.ceil(steps / 10))),
        eval_windows=given.get("eval_windows", 128),
        save_every=given.get("save_every", max(1, math.ceil(steps / 4))),
        seed=given.get("seed", 0),
        ranks=given.get("ranks"),
        output=output,
        checkpoints=checkpoints,
        cache=host_path(given["cache"]) if "cache" in given else output.parent / ".craken_cache",
        prompt=given.get("prompt", DEFAULT_PROMPT),
        resume=resume,
        keep_last=given.get("keep_last", KEPT_CHECKPOINTS),
        kept_batch_size=batch_size if adjusts_batch else None,
        given=given,
    )


def flags_to_keep(options: Options, *, num_ranks: int, batch_size: int) -> dict[str, Any]:
    """Return the flags of this run for `--resume`, paths made absolute: it may come from elsewhere."""
    paths = {name: absolute(options.given[name]) for name in PATH_FLAGS & options.given.keys()}
    if options.preset is None:
        paths["model"] = absolute(options.model)
    return {**options.given, **paths, "output": str(options.output), "ranks": num_ranks, BATCH_SIZE: batch_size}


def save_given(options: Options, *, num_ranks: int, batch_size: int) -> None:
    """Write the flags of this run into its folder."""
    text = json.dumps(flags_to_keep(options, num_ranks=num_ranks, batch_size=batch_size), indent=2)
    file = options.output / FLAGS
    partial = file.with_name(FLAGS + ".partial")
    partial.write_text(text + "\n", "utf-8")
    partial.replace(file)


def _default_output(model: str, zero: int) -> Path:
    return Path("runs", f"{Path(model).stem}-zero{zero}")


def _free_folder(wanted: Path) -> Path:
    """Return `wanted`, or `wanted-2`, `-3`, ... where a run has been before: a default never overwrites anything."""
    folder, number = wanted, 2
    while folder.exists():
        folder, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return folder


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        example = next(iter(sorted(Path(path).glob("*.json"))), "configs/ds_zero2_config.json")
        raise ValueError(f"--config {path} {what}; expected a JSON file such as {example}")
    try:
        raw = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"--config {path} holds a {type(raw).__name__}; expected a JSON object")
    return raw


def _stage_in(config: dict[str, Any]) -> int:
    section = config.get("zero_optimization", {} if config else {"stage": 2})
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    return stage if isinstance(stage, int) else 2


def _precision_in(config: dict[str, Any]) -> str:
    enabled = [
        name for name in ("bf16", "fp16") if isinstance(config.get(name), dict) and config[name].get("enabled") is True
    ]
    return enabled[0] if enabled else "fp32" if config else "bf16"


def _whole(least: int) -> Any:
    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole_number


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
