"""Wrong configurations and the lines that say so: key path, what was expected, what to type instead."""

from __future__ import annotations

from typing import Any

import pytest

from craken.config import load_config


def _zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


def _optimizer(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


def _schedule(name: str, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


# (configuration, parts that its one problem line must hold, key path first)
WRONG: list[tuple[dict[str, Any], list[str]]] = [
    # slips of top-level keys
    ({"train_batchsize": 8}, ["train_batchsize: ", 'did you mean "train_batch_size"?']),
    ({"train_batch": 8}, ["train_batch: ", 'did you mean "train_batch_size"?']),
    ({"train_micro_batch_size": 8}, ["train_micro_batch_size: ", '"train_micro_batch_size_per_gpu"?']),
    ({"gradient_acumulation_steps": 8}, ["gradient_acumulation_steps: ", '"gradient_accumulation_steps"?']),
    ({"zero_optimisation": {"stage": 1}}, ["zero_optimisation: ", 'did you mean "zero_optimization"?']),
    ({"FP16": {"enabled": True}}, ["FP16: ", 'did you mean "fp16"?']),
    ({"optimiser": {"type": "Adam"}}, ["optimiser: ", 'did you mean "optimizer"?']),
    ({"sheduler": {"type": "WarmupLR"}}, ["sheduler: ", 'did you mean "scheduler"?']),
    ({"gradient-clipping": 1.0}, ["gradient-clipping: ", 'did you mean "gradient_clipping"?']),
    # unknown keys inside sections
    (_zero(stgae=2), ["zero_optimization.stgae: ", 'did you mean "zero_optimization.stage"?']),
    (_zero(reduce_bucketsize=5), ["zero_optimization.reduce_bucketsize: ", '"zero_optimization.reduce_bucket_size"?']),
    (
        _zero(offload_optimizer={"devise": "cpu"}),
        ["zero_optimization.offload_optimizer.devise: ", '"zero_optimization.offload_optimizer.device"?'],
    ),
    ({"fp16": {"enable": True}}, ["fp16.enable: ", 'did you mean "fp16.enabled"?']),
    ({"bf16": {"loss_scale": 0}}, ["bf16.loss_scale: ", 'did you mean "fp16.loss_scale"?']),
    ({"optimizer": {"type": "Adam", "lr": 1}}, ["optimizer.lr: ", 'did you mean "optimizer.params.lr"?']),
    (
        {"activation_checkpointing": {"partitioned_activations": True}},
        ['"activation_checkpointing.partition_activations"?'],
    ),
    ({"optimizer": {"type": "Adam", "foo": 1}}, ["optimizer.foo: ", "known here: type, params, legacy_fusion"]),
    (
        _zero(device="cpu"),
        ['"zero_optimization.offload_param.device" or "zero_optimization.offload_optimizer.device"?'],
    ),
    (_zero(optimizer={}), ["zero_optimization.optimizer: ", 'did you mean "optimizer"?']),
    (_zero(enabled=True), ["zero_optimization.enabled: ", "known here: stage, "]),
    (_optimizer(learning_rate=1e-3), ["optimizer.params.learning_rate: ", 'did you mean "lr"?']),
    # wrong types
    ({"train_batch_size": "8"}, ["train_batch_size: expected a whole number >= 1", '"8"', "write 8 without quotes"]),
    ({"train_batch_size": 8.5}, ["train_batch_size: expected a whole number >= 1, got 8.5"]),
    ({"train_batch_size": True}, ["train_batch_size: ", "got true", "true and false are no numbers"]),
    ({"train_batch_size": [8]}, ["train_batch_size: expected a whole number >= 1, got the list [8]"]),
    ({"gradient_clipping": "1e-1"}, ["gradient_clipping: expected a number >= 0", "write 0.1 without quotes"]),
    ({"wall_clock_breakdown": "true"}, ["wall_clock_breakdown: expected true or false", "write true without quotes"]),
    ({"prescale_gradients": 1}, ["prescale_gradients: expected true or false, got 1; write true"]),
    (_zero(overlap_comm="no"), ['zero_optimization.overlap_comm: expected true or false, got the text "no"']),
    (_zero(reduce_bucket_size=True), ["zero_optimization.reduce_bucket_size: ", "got true"]),
    (_zero(reduce_bucket_size="5e8"), ["zero_optimization.reduce_bucket_size: ", "write 500000000 without quotes"]),
    ({"steps_per_print": "inf"}, ["steps_per_print: expected a whole number >= 1, or inf for never"]),
    ({"tensorboard": {"output_path": 3}}, ["tensorboard.output_path: expected a text in quotes, got 3"]),
    ({"comms_logger": {"prof_ops": [1]}}, ["comms_logger.prof_ops: expected a list of texts"]),
    # sections that are no objects
    ({"zero_optimization": 2}, ["zero_optimization: expected an object { }, got 2", 'write {"stage": ...}']),
    ({"fp16": True}, ["fp16: expected an object { }, got true", 'write {"enabled": ...}']),
    ({"optimizer": "AdamW"}, ['optimizer: expected an object { }, got the text "AdamW"', 'write {"type": ...}']),
    (_zero(offload_optimizer="cpu"), ["zero_optimization.offload_optimizer: expected an object", '{"device": ...}']),
    ({"optimizer": {"type": "Adam", "params": [1]}}, ["optimizer.params: expected an object { }, got the list [1]"]),
    # sizes and rates out of range
    ({"train_batch_size": 0}, ["train_batch_size: expected a whole number >= 1, got 0"]),
    ({"train_micro_batch_size_per_gpu": -4}, ["train_micro_batch_size_per_gpu: ", ">= 1, got -4"]),
    ({"gradient_clipping": -1}, ["gradient_clipping: expected a number >= 0, got -1"]),
    ({"gradient_predivide_factor": 0}, ["gradient_predivide_factor: expected a number > 0, got 0"]),
    ({"gradient_clipping": float("nan")}, ["gradient_clipping: expected a number >= 0, got NaN"]),
    (_zero(stage=4), ["zero_optimization.stage: expected 0 (off), 1 (optimizer states), 2", "got 4"]),
    (_zero(stage=-1), ["zero_optimization.stage: expected 0 (off)", "got -1"]),
    (_zero(reduce_bucket_size=-1), ["zero_optimization.reduce_bucket_size: expected a whole number >= 1, got -1"]),
    (_zero(stage3_max_live_parameters=-5), ["zero_optimization.stage3_max_live_parameters: ", ">= 0, got -5"]),
    (_zero(max_live_parameters=-5), ["zero_optimization.max_live_parameters: ", ">= 0, got -5"]),
    ({"fp16": {"loss_scale": -1}}, ["fp16.loss_scale: expected a number >= 0, got -1"]),
    (_optimizer(lr=-1e-3), ["optimizer.params.lr: expected a number >= 0, got -0.001"]),
    (_optimizer(lr="1e-3"), ["optimizer.params.lr: ", "write 0.001 without quotes"]),
    (_optimizer(betas=[0.9, 1.0]), ["optimizer.params.betas: ", "each >= 0 and < 1", "got the list [0.9, 1.0]"]),
    (_optimizer(eps="1e-8"), ["optimizer.params.eps: expected a number >= 0", "write it without quotes"]),
    (_optimizer(weight_decay=[0.1, -0.1]), ["optimizer.params.weight_decay: expected a number >= 0"]),
    (_schedule("WarmupLR", warmup_num_steps=0), ["scheduler.params.warmup_num_steps: ", ">= 1, got 0"]),
    (_schedule("WarmupLR", warmup_type="cosine"), ['scheduler.params.warmup_type: expected one of "log", "linear"']),
    # closed sets
    ({"communication_data_type": "fp8"}, ['communication_data_type: expected one of "fp32", "fp16", "bf16"', '"fp8"']),
    ({"gradient_allreduce_op": "average"}, ['gradient_allreduce_op: expected one of "mean", "sum"']),
    (_zero(offload_optimizer={"device": "gpu"}), ['.offload_optimizer.device: expected one of "none", "cpu", "nvme"']),
    ({"checkpoint": {"tag_validation": "warning"}}, ["checkpoint.tag_validation: ", 'write "warn"']),
    ({"data_types": {"grad_accum_dtype": "int8"}}, ["data_types.grad_accum_dtype: expected one of"]),
    # names
    ({"optimizer": {"type": "AdmaW"}}, ['optimizer.type: expected a known name, got "AdmaW"; did you mean "AdamW"?']),
    ({"optimizer": {"params": {"lr": 1}}}, ["optimizer.type: expected a name in quotes, got nothing", '"AdamW"']),
    ({"scheduler": {}}, ["scheduler.type: expected a name in quotes, got nothing", '"WarmupLR"']),
    (_schedule("WarmUpLR"), ["scheduler.type: ", 'did you mean "WarmupLR"?']),
    (_optimizer(weight_decy=0.1), ["optimizer.params.weight_decy: ", 'did you mean "weight_decay"?']),
    (_optimizer(max_grad_norm=1.0), ["optimizer.params.max_grad_norm: ", '"gradient_clipping": 1.0 at the top level']),
    (_schedule("OneCycle", cycle_max=1), ["scheduler.params.cycle_max: ", '"scheduler.params.cycle_max_lr"?']),
    (_schedule("WarmupLR", total_num_steps=9), ["scheduler.params.total_num_steps: expected a known key"]),
    # settings that need another, or exclude each other
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["fp16.enabled: expected fp16 or bf16, got both enabled"]),
    (
        _zero(stage=3, offload_param={"device": "nvme"}),
        ["zero_optimization.offload_param.nvme_path: expected a folder", 'write for example "nvme_path"'],
    ),
    (
        _zero(stage=2, offload_optimizer={"device": "nvme", "nvme_path": "none"}),
        [
            "zero_optimization.offload_optimizer.nvme_path: expected a folder",
            'got the text "none"',
            "or set ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH for accelerate launch",
        ],
    ),
    (
        _zero(stage=2, offload_optimizer={"device": "nvme"}),
        ["zero_optimization.offload_optimizer.nvme_path: expected a folder", "got nothing"],
    ),
    (
        _zero(stage=2, offload_param={"device": "cpu"}),
        ['zero_optimization.offload_param.device: expected "none" at stage 2', 'write "zero_optimization.stage": 3'],
    ),
    (
        _zero(stage=2, cpu_offload_param=True),
        ['zero_optimization.cpu_offload_param.device: expected "none" at stage 2'],
    ),
    (
        _zero(stage=2, cpu_offload=True, offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
        ["zero_optimization.cpu_offload: ", "got both", 'remove "cpu_offload"'],
    ),
    (
        _zero(stage=2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        ["zero_optimization.offload_optimizer.ratio: ", "set stage 3"],
    ),
    (
        {"fp16": {"enabled": True, "loss_scale_window": 0}},
        ["fp16.loss_scale_window: expected a number > 0 with a dynamic loss scale", '"fp16.loss_scale": 128'],
    ),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16.bf16_master_weights_and_grads: ", "stage 1, 2 or 3"]),
    (
        {"gradient_allreduce_op": "sum", "zero_optimization": {"stage": 3}},
        ['gradient_allreduce_op: expected "mean" at stage 3'],
    ),
    (_zero(stage=2, mics_shard_size=8), ["zero_optimization.mics_shard_size: ", "stage 3 beside it, got stage 2"]),
    (
        _zero(stage=3, mics_shard_size=8, zero_hpz_partition_size=8),
        ["zero_optimization.zero_hpz_partition_size: ", '"mics_shard_size"', "remove one of the two"],
    ),
    (
        _zero(prefetch_bucket_size=1, stage3_prefetch_bucket_size=2),
        ["zero_optimization.stage3_prefetch_bucket_size: expected one spelling", 'keep "stage3_prefetch_bucket_size"'],
    ),
    ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, ["bf16: expected one spelling of the key"]),
    (
        {"checkpoint": {"partition_activations": True}, "activation_checkpointing": {"profile": True}},
        ["checkpoint.partition_activations: ", 'keep the section "activation_checkpointing"'],
    ),
    ({"checkpoint": {"activation_checkpointing": 3}}, ["checkpoint.activation_checkpointing: "]),
    ({"checkpoint": {"activation_checkpointing": {"profil": True}}}, ["checkpoint.activation_checkpointing.profil: "]),
]


@pytest.mark.parametrize(("config", "parts"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_configuration_gives_one_line_with_path_and_remedy(config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match="^configuration: ") as caught:
        load_config(config)
    line = str(caught.value).removeprefix("configuration: ")
    assert "\n" not in line
    assert not parts[0].endswith(": ") or line.startswith(parts[0])
    for part in parts:
        assert part in line


def test_all_problems_are_named_at_once() -> None:
    config = {
        "train_batchsize": 8,
        "gradient_clipping": -1,
        "zero_optimization": {"stage": "two", "reduce_bucket": 1, "offload_param": {"device": "nvme"}},
        "fp16": {"enabled": True, "hysteresis": 0},
        "bf16": {"enabled": True},
    }
    with pytest.raises(ValueError, match="problems") as caught:
        load_config(config)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[0] == "configuration: 8 problems"
    assert {line.split(":")[0] for line in lines[1:]} == {
        "train_batchsize",
        "gradient_clipping",
        "zero_optimization.stage",
        "zero_optimization.reduce_bucket",
        "zero_optimization.offload_param.nvme_path",
        "zero_optimization.offload_param.device",
        "fp16.hysteresis",
        "fp16.enabled",
    }


def test_the_table_holds_at_least_forty_configurations() -> None:
    assert len(WRONG) >= 40
