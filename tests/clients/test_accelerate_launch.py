"""`accelerate launch` with the files users have, and one that `accelerate config` writes: each key has its effect."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from tests.clients.clients_common import ROOT, fresh_environment, tiny_llama
from tests.clients.launched import rows

pytestmark = [pytest.mark.clients, pytest.mark.launches]
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")

SCRIPT = Path(__file__).with_name("launched.py")

LORA = (ROOT / "examples" / "sft" / "zero3.yaml").read_text()
QLORA = (ROOT / "examples" / "sft" / "zero3_qlora.yaml").read_text()
SEQ2SEQ = """
compute_environment: LOCAL_MACHINE
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: cpu
  offload_param_device: cpu
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
downcast_bf16: 'no'
dynamo_backend: 'NO'
fsdp_config: {}
machine_rank: 0
main_training_function: main
megatron_lm_config: {}
mixed_precision: 'no'
num_machines: 1
num_processes: 1
rdzv_backend: static
same_network: true
use_cpu: false
"""

USUAL = {"Which type of machine": "multi-GPU", "use DeepSpeed": "yes", "How many GPU": "2"}
ANSWERS = {  # by a part of the question; Enter to all others
    "states in files": {
        **USUAL,
        "optimization stage": 2,
        "Where to offload optimizer states": "nvme",
        "Nvme Path to offload optimizer": "unused",
        "gradient accumulation steps": "2",
        "want to use gradient clipping": "yes",
        "gradient clipping value": "0.5",
        "mixed precision": "fp16",
    },
    "weights in files": {
        **USUAL,
        "optimization stage": 3,
        "Where to offload parameters": "nvme",
        "Nvme Path to offload parameters": "unused",
        "gradient accumulation steps": "4",
        "save 16-bit model weights": "yes",
        "enable `deepspeed.zero.Init`": "yes",
    },
}


def write_config(path: str, answers: dict[str, Any]) -> list[str]:
    """Answer `accelerate config`'s questions; returns the answers that no question asked for."""
    import builtins

    from accelerate.commands.config.config import config_command, config_command_parser
    from accelerate.commands.menu import BulletMenu

    unused = dict(answers)

    def answer(prompt: str) -> Any:
        key = next((key for key in unused if key.lower() in prompt.lower()), None)
        return None if key is None else unused.pop(key)

    def chosen(menu: Any, default_choice: int = 0) -> int:
        given = answer(menu.prompt or "")
        names = [str(choice).lower() for choice in menu.choices]
        return default_choice if given is None else names.index(str(given).lower())

    original_input, original_menu = builtins.input, BulletMenu.run
    builtins.input, BulletMenu.run = lambda prompt="": answer(prompt) or "", chosen  # type: ignore[assignment]
    try:
        config_command(config_command_parser().parse_args(["--config_file", path]))
    finally:
        builtins.input, BulletMenu.run = original_input, original_menu
    return list(unused)


def save_model(folder: str, config: dict[str, Any]) -> None:
    """Save a model; where weights are to leave the device, with embeddings that are too large to stay whole there."""
    leaves = config["deepspeed_config"].get("offload_param_device", "none") != "none"
    tiny_llama(vocab_size=4096 if leaves else 64).save_pretrained(folder)


class Plain(NamedTuple):
    """What plain PyTorch makes of a run's settings, in fp32, in one process that sees all ranks' batches."""

    losses: list[float]
    num_steps: int


def plain(folder: str, num_ranks: int, accumulation: int, clipping: float) -> Plain:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = torch.utils.data.DataLoader(rows(64), batch_size=2 * num_ranks)
    losses, num_steps = [], 0
    for index, batch in enumerate(batches):
        loss = model(**batch).loss
        (loss / accumulation).backward()
        losses.append(loss.item())
        if (index + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
            optimizer.step()
            optimizer.zero_grad()
            num_steps += 1
    return Plain(losses, num_steps)


def launch(text: str, num_ranks: int, folder: Path, *, script: Path = SCRIPT, **variables: str) -> dict[str, Any]:
    """Run the script under `accelerate launch`; returns what it wrote."""
    config, output = folder / "config.yaml", folder / "output.json"
    config.write_text(text)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(num_ranks), "--main_process_port", "0", str(script), str(folder), str(output)]
    environment = fresh_environment(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", **variables)
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(output.read_text())


def check_effects(config: dict[str, Any], seen: dict[str, Any], expected: Plain) -> None:
    """Compare what the script saw with what the file says."""
    wanted = config["deepspeed_config"]
    assert seen["engine"].endswith("DeepSpeedEngine")
    assert seen["stage"] == wanted["zero_stage"]
    assert seen["accumulation"] == wanted.get("gradient_accumulation_steps", 1)
    assert seen["clipping"] == wanted.get("gradient_clipping", 1.0)  # accelerate's own
    assert seen["steps"] == expected.num_steps
    assert seen["is_born_sharded"] == (wanted["zero_stage"] == 3)
    saves = wanted["zero_stage"] < 3 or wanted.get("zero3_save_16bit_model", False)
    assert isinstance(seen["saved"], list if saves else str)
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[config["mixed_precision"]]
    assert seen["dtypes"] == [f"torch.{dtype}"]
    assert (seen["loss_scale"] > 1) == (dtype == "float16")
    offloaded = wanted.get("offload_optimizer_device", "none")
    assert seen["optimizer"] == ("AdamW" if offloaded == "none" else "DeepSpeedCPUAdam")
    check_where_weights_rest(wanted.get("offload_param_device", "none"), offloaded, seen)
    assert expected.losses[0] - expected.losses[-1] > 0.03, "what is learnt would hide in the tolerance"
    atol = 1e-5 if dtype == "float32" else 0.003
    torch.testing.assert_close(seen["losses"], expected.losses, rtol=0, atol=atol)


def check_where_weights_rest(device: str, states_device: str, seen: dict[str, Any]) -> None:
    """Files hold this rank's share of the weights that leave the device, unless they hold states, too."""
    assert seen["offload_param"] == device
    in_files = seen["held"]["nvme"]
    assert seen["shards_on"] == ([] if device == "none" else ["cpu"])
    assert (seen["shard_bytes"] > 0) == (device != "none")
    assert in_files > 0 if states_device == "nvme" else in_files == (seen["shard_bytes"] if device == "nvme" else 0)


EXACT = (
    LORA.replace("mixed_precision: bf16", "mixed_precision: 'no'")
    .replace("model: true", "model: false")
    .replace("init_flag: true", "init_flag: false")  # accelerate reads this word and then does not ask for it
)
ZERO0 = (
    (ROOT / "configs" / "accelerate_zero1.yaml")
    .read_text()
    .replace("zero_stage: 1", "zero_stage: 0")
    .replace("mixed_precision: bf16", "mixed_precision: 'no'")
)
FILES: dict[str, tuple[Callable[[], str], int]] = {
    "LoRA": (lambda: LORA, 2),
    "QLoRA": (lambda: QLORA, 2),
    "seq2seq": (lambda: SEQ2SEQ, 1),
    "LoRA in fp32": (lambda: EXACT, 2),
    "zero0": (lambda: ZERO0, 2),
    "zero1": (lambda: (ROOT / "configs" / "accelerate_zero1.yaml").read_text(), 2),
    "zero2": (lambda: (ROOT / "configs" / "accelerate_zero2.yaml").read_text(), 2),
    "zero3": (lambda: (ROOT / "configs" / "accelerate_zero3.yaml").read_text(), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_that_users_have_does_what_it_says(run_ranks, tmp_path: Path, name) -> None:
    text, num_ranks = FILES[name][0](), FILES[name][1]
    config = yaml.safe_load(text)
    run_ranks(save_model, 1, str(tmp_path), config, joins_world=False)
    wanted = config["deepspeed_config"]
    accumulation, clipping = wanted.get("gradient_accumulation_steps", 1), wanted.get("gradient_clipping", 1.0)
    expected = run_ranks(plain, 1, str(tmp_path), num_ranks, accumulation, clipping, joins_world=False)[0]
    check_effects(config, launch(text, num_ranks, tmp_path), expected)


@pytest.mark.parametrize("kind", list(ANSWERS))
def test_a_file_that_accelerate_config_wrote_does_what_was_answered(run_ranks, tmp_path: Path, kind) -> None:
    written = tmp_path / "written.yaml"
    assert run_ranks(write_config, 1, str(written), ANSWERS[kind], joins_world=False) == [[]]
    config = yaml.safe_load(written.read_text())
    assert config["distributed_type"] == "DEEPSPEED"
    run_ranks(save_model, 1, str(tmp_path), config, joins_world=False)
    wanted = config["deepspeed_config"]
    accumulation, clipping = wanted["gradient_accumulation_steps"], wanted.get("gradient_clipping", 1.0)
    expected = run_ranks(plain, 1, str(tmp_path), 2, accumulation, clipping, joins_world=False)[0]
    # accelerate asks for a path and then reads it from here alone
    names = ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH")
    check_effects(config, launch(written.read_text(), 2, tmp_path, **dict.fromkeys(names, str(tmp_path))), expected)
