"""`zero_to_fp32.py` beside `latest`: there after each save, and it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from craken.checkpoint.recovery_script import SCRIPT_NAME, leave_script
from tests.unit.checkpoint.models import same, save_model, two_layers

ROOT = Path(__file__).resolve().parents[3]


def test_a_save_leaves_a_script_that_writes_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    save_model(folder, {name: weight.bfloat16() for name, weight in two_layers().items()})
    words = [sys.executable, SCRIPT_NAME, ".", str(tmp_path / "out"), "--safe_serialization", "--tag", "global_step1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    expected = {name: weight.bfloat16().float() for name, weight in two_layers().items()}
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert os.access(folder / SCRIPT_NAME, os.X_OK)


def test_a_python_without_the_package_is_told_in_a_sentence(tmp_path: Path) -> None:
    leave_script(tmp_path)
    words = [sys.executable, "-I", "-S", SCRIPT_NAME, ".", "out"]  # sees the standard library alone
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"No module named 'craken' for {sys.executable}: run zero_to_fp32.py with the Python of an environment that "
        "has craken\n"
    )


def test_a_script_of_another_release_is_renewed_and_a_current_one_left(tmp_path: Path) -> None:
    (tmp_path / SCRIPT_NAME).write_text("old")
    leave_script(tmp_path)
    written = (tmp_path / SCRIPT_NAME).stat()
    assert written.st_size > 100
    leave_script(tmp_path)
    assert (tmp_path / SCRIPT_NAME).stat().st_mtime_ns == written.st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == [SCRIPT_NAME]
