"""Writes a run's DeepSpeed configuration: the user's file, the flags over it, defaults where both are silent."""

from __future__ import annotations

from typing import Any

from craken.config import BatchSizes, read_config
from craken.train.arguments import Options
from craken.train.presets import ADAM_SHARE

GRADIENT_CLIPPING = 0.3
WARMUP_FRACTION = 0.08
FINAL_LR_RATIO = 0.05
BUCKET_ELEMENTS = 50_000_000
WHOLE, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
QUIET = 1_000_000_000  # steps between the engine's own progress lines: the run shows its own


def engine_config(options: Options) -> dict[str, Any]:
    """Return the configuration to hand to `craken.initialize`; the user's file is read, never changed.

    ValueError for a file that the library would refuse.
    """
    config = read_config(options.config) if options.config else {}
    if "bfloat16" in config:
        config["bf16"] = config.pop("bfloat16")
    _set_batch(config, options)
    _set_stage(config, options)
    _set_precision(config, options)
    _set_optimizer(config, options)
    _set_schedule(config, options)
    _set_checkpoints(config, options)
    if not options.config:
        config |= {"gradient_clipping": GRADIENT_CLIPPING, "steps_per_print": QUIET}
    return {**config, "dataloader_drop_last": True}  # every micro-batch is whole, so that tokens a step are constant


def kept_batch(given: BatchSizes, train_batch_size: int, num_ranks: int) -> BatchSizes:
    """Return `given` with the accumulation that makes `train_batch_size`; ValueError where none does."""
    unit = given.micro_batch_size * num_ranks
    if train_batch_size % unit:
        raise ValueError(
            f"--resume: a step of this run takes {train_batch_size} sequences, which do not divide into micro-batches "
            f"of {given.micro_batch_size} on {num_ranks} ranks ({unit} at a time); give --ranks or --micro-batch that "
            "divide it, or --accumulation to go on with steps of another size"
        )
    return BatchSizes(train_batch_size, given.micro_batch_size, train_batch_size // unit)


def with_batch(config: dict[str, Any], batch: BatchSizes) -> dict[str, Any]:
    """Return the configuration with these batch sizes."""
    sizes = (batch.train_batch_size, batch.micro_batch_size, batch.accumulation_steps)
    return {**config, **dict(zip((WHOLE, MICRO, ACCUMULATION), sizes, strict=True))}


def _set_batch(config: dict[str, Any], options: Options) -> None:
    """Fill the batch triple: a flag wins; a whole batch named in the file stands unless a flag says otherwise."""
    flags = {MICRO: options.given.get("micro_batch"), ACCUMULATION: options.given.get("accumulation")}
    if any(flags.values()):
        config.pop(WHOLE, None)
    config |= {key: value for key, value in flags.items() if value}
    if not _is_set(config, WHOLE):
        config.pop(WHOLE, None)
        defaults = {MICRO: options.micro_batch_size, ACCUMULATION: options.accumulation_steps}
        config |= {key: value for key, value in defaults.items() if not _is_set(config, key)}


def _set_stage(config: dict[str, Any], options: Options) -> None:
    if not options.config:
        config["zero_optimization"] = {
            "stage": options.zero,
            "overlap_comm": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
        }
    elif "zero" in options.given:
        section = dict(config.get("zero_optimization") or {})
        if options.zero < 2:
            section.pop("offload_optimizer", None)  # belongs to stages 2 and up
        config["zero_optimization"] = {**section, "stage": options.zero}


def _set_precision(config: dict[str, Any], options: Options) -> None:
    if (
        options.config
        and "precision" not in options.given
        and any(_is_decided(config, key) for key in ("bf16", "fp16"))
    ):
        return
    for name in ("bf16", "fp16"):
        section = config.get(name)
        if options.precision == name:
            config[name] = {**(section if isinstance(section, dict) else {}), "enabled": True}
        elif section is not None:
            config[name] = {"enabled": False}


def _set_optimizer(config: dict[str, Any], options: Options) -> None:
    if not _is_set(config, "optimizer") and _rests_in_files(config):  # for which Muon needs too much at once
        params = {"lr": options.lr * ADAM_SHARE, "weight_decay": 0.01, "betas": [0.9, 0.95]}
        config["optimizer"] = {"type": "AdamW", "params": params}
        return
    if not _is_set(config, "optimizer"):
        rates = {"muon_lr": options.lr, "adam_lr": options.lr * ADAM_SHARE}
        config["optimizer"] = {"type": "Muon", "params": {**rates, "weight_decay": 0.01, "betas": [0.9, 0.95]}}
        return
    params = config["optimizer"]["params"] = dict(config["optimizer"].get("params") or {})
    if "lr" in options.given or not any(_is_set(params, key) for key in ("lr", "muon_lr", "adam_lr")):
        is_muon = str(config["optimizer"].get("type")).lower() == "muon"
        params["lr"] = options.lr if is_muon or "lr" in options.given else options.lr * ADAM_SHARE


def _rests_in_files(config: dict[str, Any]) -> bool:
    zero = config.get("zero_optimization")
    section = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    return isinstance(section, dict) and section.get("device") == "nvme"


def _set_schedule(config: dict[str, Any], options: Options) -> None:
    if not _is_set(config, "scheduler"):
        config["scheduler"] = {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": options.steps,
                "warmup_num_steps": max(2, round(options.steps * WARMUP_FRACTION)),
                "warmup_type": "linear",
                "warmup_min_ratio": 0.1,
                "cos_min_ratio": FINAL_LR_RATIO,
            },
        }


def _set_checkpoints(config: dict[str, Any], options: Options) -> None:
    section = config.get("checkpoint") or {}
    if not isinstance(section, dict):
        return  # the library's own check says what is wrong
    if "keep_last" in options.given or "keep_last" not in section:
        config["checkpoint"] = {**section, "keep_last": options.keep_last or None}


def _is_set(section: dict[str, Any], key: str) -> bool:
    return section.get(key) not in (None, "auto")


def _is_decided(config: dict[str, Any], key: str) -> bool:
    section = config.get(key)
    return isinstance(section, dict) and section.get("enabled") in (True, False)
