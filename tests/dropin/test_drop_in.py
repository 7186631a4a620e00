"""The distribution named `deepspeed`: its names, its cost, its metadata."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dropin" / "deepspeed"

NAMES = """
deepspeed: initialize init_distributed add_config_arguments DeepSpeedEngine get_accelerator log_dist logger __version__
deepspeed: DeepSpeedConfig DeepSpeedConfigError OnDevice
deepspeed.comm: init_distributed is_initialized get_rank get_world_size get_local_rank barrier all_reduce ReduceOp
deepspeed.comm: all_gather_into_tensor reduce_scatter_tensor all_to_all_single send recv isend irecv reduce gather
deepspeed.comm: scatter all_gather broadcast new_group destroy_process_group get_global_rank get_world_group
deepspeed.accelerator: get_accelerator
deepspeed.zero: GatheredParameters Init MiCS_Init ZeroParamStatus
deepspeed.zero: register_external_parameter unregister_external_parameter TiledLinear DeepSpeedTensorOverride
deepspeed.checkpointing: configure checkpoint is_configured reset
deepspeed.runtime.activation_checkpointing.checkpointing: configure checkpoint is_configured reset
deepspeed.runtime.zero: GatheredParameters Init TiledLinear
deepspeed.runtime.zero.config: DeepSpeedZeroConfig ZeroStageEnum
deepspeed.runtime.zero.offload_config: OffloadDeviceEnum OffloadStateTypeEnum DeepSpeedZeroOffloadParamConfig
deepspeed.runtime.zero.offload_config: DeepSpeedZeroOffloadOptimizerConfig
deepspeed.runtime.zero.stage3: DeepSpeedZeroOptimizer_Stage3
deepspeed.runtime.zero.stage_1_and_2: DeepSpeedZeroOptimizer
deepspeed.runtime.zero.partition_parameters: Init GatheredParameters ZeroParamStatus register_external_parameter
deepspeed.runtime.zero.partition_parameters: zero_wrapper_for_fp_tensor_constructor _orig_torch_arange get_accelerator
deepspeed.utils: logger log_dist RepeatingLoader
deepspeed.utils: safe_get_full_fp32_param safe_get_full_grad safe_get_full_optimizer_state safe_get_local_fp32_param
deepspeed.utils: safe_get_local_grad safe_get_local_optimizer_state safe_set_full_fp32_param safe_set_full_grad
deepspeed.utils: safe_set_full_optimizer_state safe_set_local_fp32_param safe_set_local_grad
deepspeed.utils: safe_set_local_optimizer_state
deepspeed.utils.logging: logger log_dist
deepspeed.utils.zero_to_fp32: get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint main
deepspeed.utils.zero_to_fp32: convert_zero_checkpoint_to_fp32_state_dict
deepspeed.runtime.engine: DeepSpeedEngine
deepspeed.runtime.config: DeepSpeedConfig
deepspeed.runtime.dataloader: RepeatingLoader
deepspeed.runtime.utils: see_memory_usage
deepspeed.runtime.lr_schedules: VALID_LR_SCHEDULES LRRangeTest OneCycle WarmupLR WarmupDecayLR WarmupCosineLR
deepspeed.ops.adam: FusedAdam DeepSpeedCPUAdam
deepspeed.ops.adam.fused_adam: FusedAdam
deepspeed.ops.adam.cpu_adam: DeepSpeedCPUAdam
deepspeed.ops.adagrad: DeepSpeedCPUAdagrad
deepspeed.ops.lion: DeepSpeedCPULion FusedLion
deepspeed.ops.lamb: FusedLamb
deepspeed.checkpoint.utils: clone_tensors_for_torch_save
deepspeed.launcher.runner: main DEEPSPEED_ENVIRONMENT_NAME
"""
CLIENTS = ("transformers", "accelerate", "peft", "trl", "tokenizers", "bitsandbytes", "tensorboard", "wandb")


def _python(code: str, path: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _from_tree(code: str, **variables: str) -> str:
    return _python(code, f"{ROOT}{os.pathsep}{ROOT / 'dropin'}", **variables)


def test_every_promised_name_is_there() -> None:
    code = f"""
import importlib
for line in {NAMES!r}.split("\\n"):
    module, _, names = line.partition(": ")
    missing = [name for name in names.split() if not hasattr(importlib.import_module(module), name)]
    assert not missing, (module, missing)
"""
    _from_tree(code.replace('.split("\\n")', ".strip().splitlines()"))


def test_one_import_reaches_what_clients_take_as_attributes() -> None:
    code = """
import deepspeed
assert deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES == [
    "LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"]
assert deepspeed.runtime.engine.DeepSpeedEngine is deepspeed.DeepSpeedEngine
assert deepspeed.ops.adam.FusedAdam and deepspeed.comm.is_initialized() is False
assert deepspeed.launcher.runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"
import craken.zero.building.construct, deepspeed.runtime.zero.partition_parameters as pp
assert pp is craken.zero.building.construct is deepspeed.runtime.zero.partition_parameters
assert isinstance(deepspeed.DeepSpeedConfig({"train_batch_size": 2}).train_batch_size, int)
"""
    _from_tree(code)


def test_what_is_not_built_yet_says_so_when_it_is_asked_for() -> None:
    code = """
import deepspeed
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.utils import groups

def imported():
    from deepspeed import tp_model_init

for ask in (imported, lambda: deepspeed.tp_model_init(None), groups._get_sequence_parallel_group,
            UlyssesSPAttentionHF.register_with_transformers, lambda: deepspeed.nothing):
    try:
        ask()
    except Exception as error:
        print(type(error).__name__, error)
"""
    by_import, tensors, sequences, attention, nothing = _from_tree(code).splitlines()
    assert by_import == tensors
    assert tensors.startswith("GapError deepspeed's tp_model_init is not there yet: only data parallelism works yet")
    assert sequences == attention
    assert sequences.startswith("NotImplementedError only data parallelism works yet; leave sequence parallelism")
    assert nothing == "AttributeError deepspeed (craken's drop-in) has no 'nothing' here"


def test_importing_it_is_cheap_and_loads_no_client() -> None:
    code = f"""
import sys, time
import torch
begin_s = time.process_time()
from deepspeed import DeepSpeedEngine
print(time.process_time() - begin_s)
loaded = [name for name in {CLIENTS} if name in sys.modules]
assert not loaded, loaded
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
"""
    # with compiled files kept, as they are wherever nobody turns that off; the first run may have to write them
    assert min(float(_from_tree(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(2)) < 0.5


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_holds_imports_and_no_logic(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 15
    assert not any(word in text for word in ("def ", "class ", "if ", "for ", "lambda"))


def test_the_installed_distribution_answers_clients_questions(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dropin", tmp_path / "dropin", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    words = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path / "site")]
    command = [sys.executable, "-m", "pip", *words, str(tmp_path / "dropin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = """
import importlib.metadata as metadata, importlib.util
print(metadata.metadata("deepspeed")["Version"], sorted(set(metadata.packages_distributions()["deepspeed"])))
print(importlib.util.find_spec("deepspeed") is not None, metadata.requires("deepspeed"))
print(sorted(f"{p.name}={p.value}" for p in metadata.distribution("deepspeed").entry_points))
"""
    assert _python(code, str(tmp_path / "site")).splitlines() == [
        "0.19.6+craken1 ['deepspeed']",
        "True ['craken']",
        "['deepspeed=craken.cli:deepspeed', 'ds_report=craken.cli:ds_report', 'zero_to_fp32=craken.cli:zero_to_fp32']",
    ]
