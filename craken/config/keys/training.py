"""Known keys of batch sizes, precision, optimizer and schedule."""

from __future__ import annotations

from typing import Any

from craken.config.keys.row import KnownKey, Status, rows

WORKS, ALWAYS, LATER, NO_EFFECT = Status.WORKS, Status.ALWAYS, Status.LATER, Status.NO_EFFECT

BATCH = rows(
    "",
    ("train_batch_size", WORKS, 64, "samples a step over all data-parallel ranks"),
    ("train_micro_batch_size_per_gpu", WORKS, 4, "samples of one forward pass on one rank"),
    ("gradient_accumulation_steps", WORKS, 8, "micro-batches a step; any two of these three keys give the third"),
    ("managed_gradient_accumulation", LATER, False, "set_gradient_accumulation_boundary takes the counting over"),
    ("steps_per_print", WORKS, 10, "progress is logged every so many steps; inf or absent: never"),
    ("gradient_clipping", WORKS, 0.3, "largest global L2 norm of the gradients; 0 turns clipping off"),
    ("prescale_gradients", WORKS, True, "gradients are divided by the number of ranks before the sum, not after"),
    (
        "gradient_predivide_factor",
        WORKS,
        2.0,
        "what gradients are divided by before the sum; the rest of the division comes after",
    ),
    ("gradient_allreduce_op", WORKS, "sum", "mean or sum of the gradients over ranks; sum not at stage 3"),
    ("communication_data_type", WORKS, "fp32", "format in which gradients travel; default: the compute dtype"),
    ("seq_parallel_communication_data_type", LATER, "bf16", "comes with sequence parallelism"),
    (
        "communication_data_size",
        NO_EFFECT,
        "fp16",
        "use communication_data_type for the format, zero_optimization.reduce_bucket_size for the size of messages",
    ),
    ("sparse_gradients", LATER, True, "embedding gradients travel dense"),
    ("disable_allgather", NO_EFFECT, True, "updated parameters always travel by all-gather"),
    ("allgather_size", NO_EFFECT, 1e6, "older form of zero_optimization.allgather_bucket_size"),
    ("dataloader_drop_last", WORKS, True, "the data loader leaves out a last batch that is not full"),
    ("zero_allow_untested_optimizer", ALWAYS, True, "any elementwise optimizer may be sharded, without asking"),
    ("zero_force_ds_cpu_optimizer", ALWAYS, False, "torch's own optimizers run on offloaded states"),
    ("vocabulary_size", NO_EFFECT, 50304, "the model knows its vocabulary"),
)

PRECISION = [
    *rows(
        "fp16",
        ("enabled", WORKS, True, "compute in float16 with an fp32 master copy and a loss scale"),
        ("auto_cast", WORKS, True, "float inputs of the model are cast to float16"),
        ("loss_scale", WORKS, 128, "fixed loss scale; 0: dynamic"),
        ("initial_scale_power", WORKS, 12, "a dynamic loss scale starts at 2 to this power"),
        ("loss_scale_window", WORKS, 500, "steps without overflow before the scale doubles"),
        ("hysteresis", WORKS, 4, "overflows before the scale is halved"),
        ("consecutive_hysteresis", WORKS, True, "a step without overflow refills the hysteresis"),
        ("min_loss_scale", WORKS, 2, "the dynamic scale never goes below"),
        ("fp16_master_weights_and_grads", LATER, False, "master weights and their gradients are kept in fp32"),
    ),
    *rows(
        "bf16",
        ("enabled", WORKS, True, "compute in bfloat16 with an fp32 master copy"),
        ("immediate_grad_update", ALWAYS, True, "gradients go into their buffer as soon as they exist"),
        ("check_grad_overflow", WORKS, False, "a step with a non-finite gradient norm is skipped"),
        ("bf16_master_weights_and_grads", LATER, False, "master weights and their gradients are kept in fp32"),
        ("bf16_optimizer_states", LATER, False, "optimizer states are kept in fp32"),
    ),
    KnownKey("bfloat16", WORKS, {"enabled": True}, "older name of the section", "bf16"),
    *rows(
        "torch_autocast",
        ("enabled", WORKS, True, "forward runs under torch.autocast, parameters stay fp32"),
        ("dtype", WORKS, "bf16", "the format autocast computes in"),
        ("lower_precision_safe_modules", LATER, ["torch.nn.Linear"], "autocast's own list decides"),
    ),
    *rows(
        "data_types",
        ("grad_accum_dtype", WORKS, "fp32", "format in which gradients accumulate between micro-batches"),
        ("param_dtype", LATER, "bf16", "the compute dtype follows fp16 and bf16"),
        ("buffer_dtype", LATER, "fp32", "buffers keep the dtype they have in the model"),
    ),
    *rows(
        "amp",
        ("enabled", NO_EFFECT, False, "apex is not supported; use fp16, bf16 or torch_autocast"),
        ("opt_level", NO_EFFECT, "O1", "apex is not supported; use fp16, bf16 or torch_autocast"),
    ),
]

ONE_BIT = "of OneBitAdam, OneBitLamb and ZeroOneAdam, which are refused by name"

_SHARED: tuple[Any, ...] = (
    ("last_batch_iteration", WORKS, -1, "the step the schedule resumes after"),
    ("warmup_num_steps", WORKS, 100, "steps of warm-up"),
    ("warmup_type", WORKS, "linear", "shape of the warm-up: log or linear"),
)

OPTIMIZER = [
    *rows(
        "optimizer",
        ("type", WORKS, "AdamW", "name of the optimizer; Adam decouples weight decay unless adam_w_mode is false"),
        ("params", WORKS, {"lr": 1e-3}, "arguments of the optimizer"),
        ("legacy_fusion", NO_EFFECT, True, "torch's fused kernels are used"),
    ),
    *rows(
        "optimizer.params",
        ("lr", WORKS, 3e-4, "learning rate"),
        ("betas", WORKS, [0.9, 0.95], "decay rates of the moments"),
        ("eps", WORKS, 1e-8, "added to the denominator"),
        ("weight_decay", WORKS, 0.1, "weight decay"),
        ("momentum", WORKS, 0.9, "momentum of SGD and Muon"),
        ("adam_w_mode", WORKS, False, "Adam: decoupled weight decay, as in AdamW"),
        ("torch_adam", WORKS, True, "Adam: torch's implementation, which is used anyway"),
        ("bias_correction", WORKS, False, "Adam, Lamb: correct the moments' start at zero"),
        ("amsgrad", WORKS, True, "Adam: keep the largest second moment"),
        ("max_grad_norm", NO_EFFECT, None, "refused: use gradient_clipping"),
        ("max_coeff", WORKS, 10.0, "Lamb: largest trust ratio"),
        ("min_coeff", WORKS, 0.01, "Lamb: smallest trust ratio"),
        ("eps_inside_sqrt", WORKS, True, "Lamb: eps inside the root"),
        ("fp32_optimizer_states", WORKS, True, "optimizer states in fp32"),
        ("foreach", WORKS, True, "torch's foreach kernels"),
        ("muon_lr", WORKS, 0.02, "Muon: learning rate of its matrices"),
        ("adam_lr", WORKS, 3e-4, "Muon: learning rate of the parameters that Adam updates"),
        ("ns_method", WORKS, "standard", "Muon: the iteration that orthogonalises"),
        ("freeze_step", LATER, 100, ONE_BIT),
        ("cuda_aware", LATER, False, ONE_BIT),
        ("comm_backend_name", LATER, "nccl", ONE_BIT),
        ("coeff_beta", LATER, 0.9, ONE_BIT),
        ("factor_max", LATER, 4.0, ONE_BIT),
        ("factor_min", LATER, 0.5, ONE_BIT),
        ("factor_threshold", LATER, 0.1, ONE_BIT),
        ("var_freeze_step", LATER, 100, ONE_BIT),
        ("var_update_scaler", LATER, 16, ONE_BIT),
        ("local_step_scaler", LATER, 100, ONE_BIT),
        ("local_step_clipper", LATER, 16, ONE_BIT),
    ),
]

SCHEDULER = rows(
    "scheduler",
    ("type", WORKS, "WarmupLR", "LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR or WarmupCosineLR"),
    ("params", WORKS, {"warmup_num_steps": 100}, "arguments of the schedule"),
)

SCHEDULES: dict[str, list[KnownKey]] = {
    "WarmupLR": rows(
        "scheduler.params",
        ("warmup_min_lr", WORKS, 0, "rate at the first step"),
        ("warmup_max_lr", WORKS, 1e-3, "rate after warm-up; default: the optimizer's"),
        *_SHARED,
    ),
    "WarmupDecayLR": rows(
        "scheduler.params",
        ("total_num_steps", WORKS, 1000, "the step at which the rate is zero"),
        ("warmup_min_lr", WORKS, 0, "rate at the first step"),
        ("warmup_max_lr", WORKS, 1e-3, "rate after warm-up"),
        *_SHARED,
    ),
    "WarmupCosineLR": rows(
        "scheduler.params",
        ("total_num_steps", WORKS, 1000, "the step at which the cosine ends"),
        ("warmup_min_ratio", WORKS, 0.01, "share of the optimizer's rate at the first step"),
        ("cos_min_ratio", WORKS, 0.1, "share of the optimizer's rate at the end"),
        *_SHARED,
    ),
    "OneCycle": rows(
        "scheduler.params",
        ("cycle_min_lr", WORKS, 1e-4, "rate at both ends of the cycle"),
        ("cycle_max_lr", WORKS, 1e-3, "rate at its top"),
        ("decay_lr_rate", WORKS, 0.1, "decay of the rate after the cycle"),
        ("cycle_first_step_size", WORKS, 100, "steps up"),
        ("cycle_second_step_size", WORKS, 100, "steps down; default: as many as up"),
        ("cycle_first_stair_count", WORKS, 4, "stairs on the way up; 0: smooth"),
        ("cycle_second_stair_count", WORKS, 4, "stairs on the way down"),
        ("decay_step_size", WORKS, 10, "steps between decays after the cycle; 0: none"),
        ("cycle_momentum", WORKS, False, "momentum cycles against the rate"),
        ("cycle_min_mom", WORKS, 0.85, "momentum at the top"),
        ("cycle_max_mom", WORKS, 0.95, "momentum at both ends"),
        ("decay_mom_rate", WORKS, 0.1, "decay of the momentum after the cycle"),
        _SHARED[0],
    ),
    "LRRangeTest": rows(
        "scheduler.params",
        ("lr_range_test_min_lr", WORKS, 1e-4, "rate at the first step"),
        ("lr_range_test_step_size", WORKS, 100, "steps between raises"),
        ("lr_range_test_step_rate", WORKS, 2.0, "size of a raise"),
        ("lr_range_test_staircase", WORKS, True, "raise in stairs instead of smoothly"),
        _SHARED[0],
    ),
}

SECTIONS = [
    KnownKey("optimizer", WORKS, {"type": "AdamW"}, "the optimizer, unless one is passed to initialize"),
    KnownKey("scheduler", WORKS, {"type": "WarmupLR"}, "the learning-rate schedule, unless one is passed"),
    KnownKey("fp16", WORKS, {"enabled": True}, "float16 compute"),
    KnownKey("bf16", WORKS, {"enabled": True}, "bfloat16 compute"),
    KnownKey("torch_autocast", WORKS, {"enabled": True}, "torch.autocast"),
    KnownKey("data_types", WORKS, {}, "formats of what is stored"),
    KnownKey("amp", NO_EFFECT, {"enabled": True}, "apex is not supported; use fp16, bf16 or torch_autocast"),
]

TRAINING = [*BATCH, *SECTIONS, *PRECISION, *OPTIMIZER, *SCHEDULER]
