"""The examples run as their README says, on models and data made on the spot, and learn."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clients.clients_common import ROOT, fresh_clients, fresh_environment

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
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    run([sys.executable, "examples/make_assets.py", "--output", folder, "--steps", "120"])
    return folder


def sft(script: str, assets: Path, output: Path, *flags: str, **variables: str | Path) -> tuple[list[float], str]:
    """Run a script of `examples/sft`; returns the losses of its steps, and what it printed."""
    variables |= {"MODEL": assets / "causal_lm", "DATASET": assets / "chat", "OUTPUT": output, "PROCESSES": "2"}
    printed = run([f"examples/sft/{script}", *SHORT.split(), "--logging_steps", "1", *flags], **variables)
    assert index_in(output)["shared_state"]["global_steps"] == 6, "it was not trained by an engine"
    return [entry["loss"] for entry in log_in(output) if "loss" in entry], printed


def index_in(output: Path) -> dict[str, Any]:
    return json.loads((output / "checkpoint-6" / "global_step6" / "index.json").read_text())["body"]


def log_in(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]


def check_adapter(assets: Path, output: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets / "causal_lm")
    loaded = peft.PeftModel.from_pretrained(model, output)
    trained = {name: param for name, param in loaded.named_parameters() if "lora_B" in name}
    assert len(trained) == 4 * 7
    assert all(param.abs().max() > 0 for param in trained.values())


def check_effects(output: Path, printed: str) -> None:
    """See what the script's flags have done to a run on two ranks."""
    assert printed.count("nothing is pushed to the hub") == 1, "--push_to_hub"
    assert printed.count("flash attention cannot run here") == 1, "--use_flash_attn"
    assert printed.count("***** Running Evaluation *****") == 1, "--evaluation_strategy epoch, --log_level info"
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert [adapter[name] for name in ("r", "lora_alpha", "lora_dropout")] == [8, 16, 0.1]
    assert len(adapter["target_modules"]) == 7, "all-linear"
    assert "<|im_start|>" in (output / "chat_template.jinja").read_text()
    steps = [entry for entry in log_in(output) if "loss" in entry]
    row_tokens = 128 * 4 * 4 * 2  # packed to --max_seq_len x samples a rank x accumulation x ranks
    assert [entry["num_tokens"] for entry in steps] == [row_tokens * step for step in range(1, 7)]
    cosine = [1e-2 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]  # from the first step: --warmup_ratio 0
    assert [entry["learning_rate"] for entry in steps] == pytest.approx(cosine)
    decays = [group["weight_decay"] for group in index_in(output)["shared_state"]["optimizer"]["groups"]]
    assert decays == [1e-4, 0.0]  # none for what has one dim


@pytest.mark.launches
def test_lora_learns_and_goes_on_from_a_checkpoint(assets: Path, tmp_path: Path) -> None:
    whole, printed = sft("run_lora.sh", assets, tmp_path, "--save_strategy", "steps", "--save_steps", "3")
    assert len(whole) == 6
    assert whole[-1] < whole[0] - 0.15, f"the loss did not fall: {whole}"
    check_adapter(assets, tmp_path)
    check_effects(tmp_path, printed)
    (tmp_path / "checkpoint-6").rename(tmp_path / "first")
    resumed, _ = sft("run_lora.sh", assets, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    assert resumed == whole


def all_sharded(folder: Path) -> Path:
    """Return the file of `run_qlora.sh` with what only a JSON can say to accelerate: no weight is small."""
    examples = ROOT / "examples" / "sft"
    assert "CONFIG:-$here/zero3_qlora.yaml" in (examples / "run_qlora.sh").read_text()
    shipped = yaml.safe_load((examples / "zero3_qlora.yaml").read_text())
    autos = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {**dict.fromkeys(autos, "auto"), "bf16": {"enabled": "auto"}}
    config["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    (folder / "zero3.json").write_text(json.dumps(config))
    del shipped["mixed_precision"]  # the JSON's
    shipped["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": True}
    (folder / "zero3.yaml").write_text(yaml.safe_dump(shipped))
    return folder / "zero3.yaml"


@pytest.mark.launches
def test_qlora_learns_on_packed_weights_that_are_sharded(assets: Path, tmp_path: Path) -> None:
    losses, printed = sft("run_qlora.sh", assets, tmp_path, CONFIG=all_sharded(tmp_path))
    assert losses[-1] < losses[0] - 0.15, f"the loss did not fall: {losses}"
    check_adapter(assets, tmp_path)
    (told,) = re.findall(r"weights that rank 0 keeps between steps, in KiB: (.*)", printed)
    found = re.findall(r"(\w+ \w+) ([\d.]+) of ([\d.]+)", told)
    kinds = {kind: (float(kept), float(whole)) for kind, kept, whole in found}
    assert kinds.keys() == {"Params4bit bfloat16", "Parameter bfloat16"}, "the model's dtype is that of packed weights"
    packed_elements = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 256)
    assert kinds["Params4bit bfloat16"][1] == packed_elements / 2 / 1024, "half a byte an element"
    for kept, whole in kinds.values():
        assert kept == pytest.approx(whole / 2, rel=0.01)


# --- flags ------------------------------------------------------------------------------------------------------------


def sft_module() -> Any:
    spec = importlib.util.spec_from_file_location("sft_train", ROOT / "examples" / "sft" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sft_train"] = module  # where its dataclasses look their types up
    spec.loader.exec_module(module)
    return module


def flags_in(script: str) -> dict[str, str]:
    """Return the flags of a script of `examples/sft` with their values, "" where there is none."""
    text = (ROOT / "examples" / "sft" / script).read_text().replace("\\\n", "")
    words = shlex.split(text.split('train.py"')[1])
    given: dict[str, str] = {}
    for word in words[:-1]:  # the last one is "$@"
        if word.startswith("--"):
            given[name := word] = ""
        else:
            given[name] = word
    return given


def parse_in_both_spellings() -> None:
    """Have the example read its script's flags as `--name value` and as `--name=value`."""
    example, flags = sft_module(), flags_in("run_lora.sh")
    assert len(flags) == 38
    words = [word for name, value in flags.items() for word in (name, value) if word]
    joined = [f"{name}={value or True}" for name, value in flags.items()]
    for argv in (words, joined):
        with fresh_clients(is_sharded=False):
            parsed = [vars(part) for part in example.parse(argv)]
        found = {name: value for part in parsed for name, value in part.items()}
        for flag, text in flags.items():
            name = example.OLD_NAMES.get(flag, flag).removeprefix("--")
            value = getattr(found[name], "value", found[name])
            if name == "use_flash_attn":
                assert value is False  # it cannot run here
            elif isinstance(value, bool):
                assert value is (text != "False"), flag
            else:
                assert value == type(value)(text), flag
        assert found["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_every_flag_is_taken_in_both_spellings(run_ranks) -> None:
    run_ranks(parse_in_both_spellings, 1, timeout_s=120.0)


def refusal_of(flags: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), fresh_clients(is_sharded=False):
        try:
            sft_module().parse(["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *flags])
        except SystemExit as stop:
            return f"{printed.getvalue()}{stop}"
    return "taken"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--splits", "train"], "--splits train: expected two"),
        (["--bnb_4bit_compute_dtype", "bf16"], r"invalid choice: 'bf16' \(choose from '?float16'?, '?bfloat16"),
        (["--chat_template_format=llama"], r"invalid choice: 'llama' \(choose from '?chatml"),
    ],
)
def test_a_wrong_flag_is_told_what_is_right(run_ranks, flags: list[str], said: str) -> None:
    assert re.search(said, run_ranks(refusal_of, 1, flags)[0])


class Letters:
    """A tokenizer with a token a letter, marks around a text, and a chat template that joins what is said."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        tokens = [ord(letter) for letter in text]
        return {"input_ids": [1, *tokens] if add_special_tokens else tokens}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "".join(said["content"] for said in messages)


def read_texts(folder: str) -> None:
    from types import SimpleNamespace

    example, names = sft_module(), SimpleNamespace(dataset_text_field="content")

    def tokens(*, has_template: bool, **flags: Any) -> dict[str, list[int]]:
        data_args = example.DataArguments(dataset_name=folder, **flags)
        with fresh_clients(is_sharded=False):
            data = example.load_texts(data_args, names, Letters(), has_template=has_template)
        return {split: rows["input_ids"][0] for split, rows in data.items()}

    assert tokens(has_template=True) == {"train": [97, 98], "test": [100]}
    assert tokens(has_template=False, splits="test,train") == {"test": [101], "train": [99]}
    marked = tokens(has_template=False, add_special_tokens=True, append_concat_token=True)
    assert marked == {"train": [1, 99, 2], "test": [1, 101, 2]}


def test_flags_about_texts_have_their_effects(run_ranks, tmp_path: Path) -> None:
    for split, said, content in (("train", "ab", "c"), ("test", "d", "e")):
        row = {"messages": [{"role": "user", "content": letter} for letter in said], "content": content}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    run_ranks(read_texts, 1, str(tmp_path), timeout_s=120.0)


@pytest.mark.launches
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
