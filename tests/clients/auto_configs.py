"""Configurations as users of accelerate and of transformers have them: what a client can fill in is "auto"."""

from __future__ import annotations

from typing import Any


def auto_config(**zero: Any) -> dict[str, Any]:
    """Return what all of them have; `zero` are the settings of "zero_optimization" beside those that are "auto"."""
    return {
        "bf16": {"enabled": "auto"},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            **zero,
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
    }


def trainer_config(stage: int, device: str = "none", folder: str = "") -> dict[str, Any]:
    """Return what transformers' documentation shows, with all that a trainer can fill in left to it."""
    offload = {"device": device, "pin_memory": True, **({"nvme_path": folder} if device == "nvme" else {})}
    return {
        **auto_config(
            stage=stage,
            **({} if device == "none" else {"offload_optimizer": offload}),
            **({} if device == "none" or stage < 3 else {"offload_param": offload}),
            overlap_comm=True,
            contiguous_gradients=True,
            sub_group_size=1e9,
            stage3_max_live_parameters=1e9,
            stage3_max_reuse_distance=1e9,
            stage3_gather_16bit_weights_on_model_save=True,
        ),
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }
