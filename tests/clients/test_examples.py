"""The examples run as their README says, on models and data made on the spot, and learn."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.clients_common import ROOT, fresh_environment

pytest.importorskip("trl", reason="needs trl (the hf extra)")
pytestmark = pytest.mark.clients

SHORT = "--max_seq_len 128 --learning_rate 2e-2 --max_steps 6 --per_device_train_batch_size 4 --report_to none"


def run(command: list[str | Path], **variables: str | Path) -> str:
    """Run a command from the repository's root in a fresh process; returns what it printed."""
    environment = fresh_environment(
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        HF_HUB_OFFLINE="1",
        **{name: str(value) for name, value in variables.items()},
    )
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    run([sys.executable, "examples/make_assets.py", "--output", folder, "--steps", "120"])
    return folder


def sft(script: str, assets: Path, output: Path, *flags: str) -> list[float]:
    """Run a script of `examples/sft`; returns the losses of its steps."""
    variables = {"MODEL": assets / "causal_lm", "DATASET": assets / "chat", "OUTPUT": output, "PROCESSES": "2"}
    run([f"examples/sft/{script}", *SHORT.split(), "--logging_steps", "1", *flags], **variables)
    checkpoint = output / "checkpoint-6"
    assert sorted((checkpoint / "global_step6").glob("index.json")), "it was not trained by an engine"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def check_adapter(assets: Path, output: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets / "causal_lm")
    loaded = peft.PeftModel.from_pretrained(model, output)
    trained = {name: param for name, param in loaded.named_parameters() if "lora_B" in name}
    assert len(trained) == 4 * 7
    assert all(param.abs().max() > 0 for param in trained.values())


def test_lora_learns_and_goes_on_from_a_checkpoint(assets: Path, tmp_path: Path) -> None:
    whole = sft("run_lora.sh", assets, tmp_path, "--save_strategy", "steps", "--save_steps", "3")
    assert len(whole) == 6
    assert whole[-1] < whole[0] - 0.15, f"the loss did not fall: {whole}"
    check_adapter(assets, tmp_path)
    (tmp_path / "checkpoint-6").rename(tmp_path / "first")
    resumed = sft("run_lora.sh", assets, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    assert resumed == whole


def test_qlora_learns(assets: Path, tmp_path: Path) -> None:
    losses = sft("run_qlora.sh", assets, tmp_path)
    assert losses[-1] < losses[0] - 0.15, f"the loss did not fall: {losses}"
    check_adapter(assets, tmp_path)


def test_seq2seq_is_right_about_all_it_was_trained_on(assets: Path, tmp_path: Path) -> None:
    launch = "accelerate launch --config_file examples/seq2seq/zero3_offload.yaml examples/seq2seq/train.py"
    options = ["--model_name_or_path", assets / "seq2seq_lm", "--dataset", assets / "complaints"]
    printed = run([*launch.split(), *options, "--output_dir", tmp_path, "--num_epochs", "10"])
    assert "ZeRO stage 3, 1 process(es)" in printed
    assert "train accuracy: 100.0 % of 64" in printed, printed
    reports = re.findall(r"train, host memory in MiB: before (\d+), after (\d+), peak (\d+)", printed)
    assert len(reports) == 10
    assert all(int(peak) >= int(after) > 0 for _, after, peak in reports)
    assert (tmp_path / "adapter_model.safetensors").is_file()
