"""`craken train` as a user runs it: a tiny model, two ranks, text in a folder.

Runs that are begun and stopped by signals are real processes, which take ten seconds, most of them to import torch.
Others prepare in the test's process, and what they would start ends up on the ranks of the pool.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from craken.train import command
from tests.dist.test_train_resume import command as run_as_rank

STEPS = 12
BASE = ["--model", "tiny", "--seq-len", "32", "--steps", str(STEPS), "--eval-every", "4", "--save-every", "5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with text in it, where this module's runs share one cache."""
    place = tmp_path_factory.mktemp("train")
    text = place / "text"
    text.mkdir()
    source = "".join(f"def function_{n}(left, right):\n    return left + right * {n}\n\n" for n in range(60))
    for number in range(8):
        (text / f"module{number}.py").write_text(source.replace("function", f"function{number}"), "utf-8")
    return place


def _command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "craken.train", *argv]


def _run(place: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*argv), cwd=place, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def run_on_pool(run_ranks, monkeypatch) -> Callable[..., str]:
    """Return `run(*argv) -> what it showed`: the command to its end, its ranks in the pool; paths are absolute."""
    started: list[tuple[list[str], int]] = []

    def launch_local(words: list[str], num_ranks: int, **_: object) -> int:
        started.append((words, num_ranks))
        return 0

    def run(*argv: str) -> str:
        assert command.main(list(argv)) == 0
        words, num_ranks = started.pop()
        assert words[:3] == _command()
        assert num_ranks == 2
        (code, shown), other = run_ranks(run_as_rank, 2, *words[3:], joins_world=False)
        assert code == 0
        assert other == (0, "")  # the first rank alone speaks
        return shown

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(command, "launch_local", launch_local)
    return run


def _rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _curve(run: Path) -> list[tuple]:
    return [
        (row["step"], row.get("loss"), row.get("grad_norm"), row.get("lr"), row.get("val_loss")) for row in _rows(run)
    ]


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """One uninterrupted run."""
    result = _run(place, *BASE, "--data", "text", "--output", "whole", "--prompt", "def function")
    assert result.returncode == 0, result.stderr
    (place / "whole" / "stdout.txt").write_text(result.stdout)
    return place / "whole"


def test_a_run_writes_every_step_and_validation(whole) -> None:
    rows = _rows(whole)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    evals = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evals] == [4, 8, 12]
    assert evals[-1]["val_loss"] < evals[0]["val_loss"]
    assert len({row["unigram_entropy"] for row in evals}) == 1


def test_the_bytes_of_a_step_are_those_of_zero_2(whole) -> None:
    from transformers import AutoModelForCausalLM

    parameters = sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(whole / "model").parameters()
    )
    expected = (8 + 1) * parameters * 2 / 2  # (g + 1) Psi (N - 1) / N elements of bf16
    assert _rows(whole)[3]["sent_bytes"] == pytest.approx(expected, rel=0.01)


def test_weights_kept_as_shards_give_the_same_curve_and_a_model_to_load(run_on_pool, place, whole) -> None:
    from transformers import AutoModelForCausalLM

    shards = place / "shards"
    run_on_pool(*BASE, "--zero", "3", "--data", str(place / "text"), "--output", str(shards))
    curves = [[row[1] for row in _curve(run) if row[1] is not None] for run in (whole, shards)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    models = [AutoModelForCausalLM.from_pretrained(run / "model") for run in (whole, shards)]
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.shape == other.shape, name
    assert f"going on after step {STEPS}" in run_on_pool("--resume", str(shards), "--steps", str(STEPS + 2))
    assert len(list((place / ".craken_cache").glob("*/meta.json"))) == 1, "the text was tokenised anew"


def test_the_output_says_what_a_user_wants_to_know(whole) -> None:
    shown = (whole / "stdout.txt").read_text()
    for words in ("ZeRO stage", "tokens/s", "grad norm", "MB/step", "unigram entropy", "completes", "report.html"):
        assert words in shown
    assert shown.count("done: 12 steps") == 1  # the first rank alone speaks


def test_the_report_shows_this_run(whole) -> None:
    page = (whole / "report.html").read_text()
    assert f"{STEPS} steps" in page
    assert "What it writes" in page


def test_transformers_loads_the_model_and_its_loss_is_the_validation_loss(whole) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from craken.train.token_cache import open_cache
    from craken.train.windows import Windows, validation_numbers

    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    assert tokenizer.decode(tokenizer("def function_1(left):").input_ids) == "def function_1(left):"
    (meta,) = (whole.parent / ".craken_cache").glob("*/meta.json")
    windows = Windows(open_cache(meta.parent).held_out(), 32)
    numbers = validation_numbers(len(windows), 128, 2).reshape(-1)
    with torch.no_grad():
        loss = float(model.eval()(**windows.batch(numbers)).loss)
    assert loss == pytest.approx(_rows(whole)[-1]["val_loss"], rel=0.01)  # bf16, other batches


def _wait_for_step(run: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(_whole_lines(run)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.7)  # for Python to have started in the ranks


def _whole_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_ctrl_c_saves_and_resuming_continues_the_same_curve_to_the_bit(place, whole) -> None:
    process = subprocess.Popen(
        _command(*BASE, "--data", "text", "--output", "stopped"),
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_step(place / "stopped", process, 2)
    process.send_signal(signal.SIGINT)
    shown, problems = process.communicate(timeout=120)
    assert process.returncode == 130, problems
    assert "Traceback" not in problems
    last = _rows(place / "stopped")[-1]["step"]
    assert last < STEPS, "the run was over before Ctrl-C came"
    assert f"stopped after step {last} of {STEPS}; checkpoint saved" in shown
    assert "--resume stopped" in shown
    assert (place / "stopped" / "report.html").exists()
    assert not (place / "stopped" / "model").exists()

    resumed = _run(place, "--resume", "stopped")
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after step {last}" in resumed.stdout
    assert _curve(place / "stopped") == _curve(whole)


def test_sigterm_saves_and_exits_0_and_the_same_command_goes_on_from_the_newest_whole_checkpoint(
    run_on_pool, place, whole
) -> None:
    run = place / "taken"
    argv = [*BASE, "--data", str(place / "text"), "--output", str(run), "--resume", "auto"]

    def begin_and_stop(until: Callable[[subprocess.Popen[str]], None]) -> str:
        process = subprocess.Popen(
            _command(*argv), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until(process)
        process.send_signal(signal.SIGTERM)
        shown, problems = process.communicate(timeout=120)
        assert process.returncode == 0, problems
        assert "Traceback" not in problems
        assert "ERROR" not in problems
        return shown

    shown = begin_and_stop(lambda process: _wait_for(run, process))  # ranks are importing torch
    assert "stopped by SIGTERM before step 1: nothing was done yet. Go on with:" in shown
    assert f"--resume auto --output {run}" in shown
    # a checkpoint of step 5 is there after 7 lines; they count validations too
    shown = begin_and_stop(lambda process: _wait_for_step(run, process, 7))
    assert f"no checkpoint in {run}{os.sep}checkpoints: beginning" in shown
    last = _rows(run)[-1]["step"]
    assert 5 < last < STEPS
    assert f"stopped by SIGTERM after step {last} of {STEPS}; checkpoint saved" in shown
    beside = {"latest", "zero_to_fp32.py"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step5", f"step{last}", *beside}
    damaged = run / "checkpoints" / f"step{last}" / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    shown = run_on_pool(*argv)
    assert f"passing over the damaged checkpoint step{last}: " in shown
    assert "rank-00001.safetensors" in shown
    assert "going on after step 5" in shown
    assert _curve(run) == _curve(whole)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step10", "step12", *beside}


def test_a_configuration_file_that_is_shipped_trains(run_on_pool, place) -> None:  # others: tests/dist
    file = Path(__file__).resolve().parents[2] / "configs" / "ds_zero2_config.json"
    argv = ["--config", str(file), "--steps", "2", "--data", str(place / "text"), "--eval-every", "2"]
    shown = run_on_pool("--model", "tiny", "--seq-len", "32", *argv, "--output", str(place / "file2"))
    assert "ZeRO stage 2" in " ".join(shown.split()) or "ZeRO-2" in shown
    assert [row["step"] for row in _rows(place / "file2") if "loss" in row] == [1, 2]


MISTAKES = [
    (["--data", "nowhere"], "--data nowhere does not exist; give a folder or a file of text"),
    (["--data", "empty"], "--data empty holds no files"),
    (["--data", "small.txt"], "is smaller than one batch"),
    (["--data", "text", "--model", "gpt5"], "--model gpt5: expected a preset"),
    (["--data", "text", "--model", "nothing.json"], "no parameters"),
    (["--data", "text", "--config", "wrong.json"], "gradient_cliping"),
    (["--data", "text", "--config", "batch.json"], "train_batch_size"),
    (["--data", "text", "--config", "precision.json"], "bf16.enabled: expected true or false"),
    (["--data", "text", "--config", "option.json"], "optimizer.params.foobar"),
    (["--data", "text", "--config", "compressed.json"], "use 'AdamW'"),
    (["--data", "text", "--output", "old"], "already holds a run"),
    (["--resume", "nowhere"], "no run of craken train there"),
    (["--zero", "7"], "invalid choice: 7"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_ends_before_any_rank_starts_with_one_line_and_code_2(
    place, monkeypatch, capsys, argv, words
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(command, "launch_local", lambda *_, **__: pytest.fail("ranks were started"))
    (place / "empty").mkdir(exist_ok=True)
    (place / "old").mkdir(exist_ok=True)
    (place / "old" / "metrics.jsonl").write_text("")
    (place / "small.txt").write_text("a few words\n" * 30)
    llama = {"model_type": "llama", "hidden_size": 0, "intermediate_size": 0, "num_hidden_layers": 0}
    (place / "nothing.json").write_text(json.dumps({**llama, "num_attention_heads": 1, "head_dim": 2}))
    (place / "wrong.json").write_text(json.dumps({"gradient_cliping": 1.0}))
    (place / "batch.json").write_text(
        json.dumps({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2})
    )
    (place / "precision.json").write_text(json.dumps({"bf16": {"enabled": "true"}}))
    (place / "option.json").write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"foobar": 1}}}))
    (place / "compressed.json").write_text(json.dumps({"optimizer": {"type": "OneBitAdam"}}))
    try:
        code = command.main(argv)
    except SystemExit as ended:
        code = ended.code
    problem = capsys.readouterr().err.strip()
    assert code == 2
    assert words in problem
    if "usage:" not in problem:
        assert len(problem.splitlines()) == 1
