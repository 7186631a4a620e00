"""What `make test_craken_ds*` starts, as make prints it: through `accelerate launch` it learns as without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.clients_common import ROOT, fresh_environment

pytestmark = [
    pytest.mark.clients,
    pytest.mark.launches,
    pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine"),
]


def _flags(place: Path, output: str) -> list[str]:
    short = ["--steps", "10", "--eval-every", "5", "--eval-windows", "8", "--seq-len", "32", "--save-every", "0"]
    where = {"--data": place / "text", "--cache": place / "cache", "--output": place / output}
    return [*short, *(str(word) for pair in where.items() for word in pair)]


def _run(*command: str) -> str:
    environment = fresh_environment()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _losses(run: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {key: [row[key] for row in rows if key in row] for key in ("loss", "val_loss")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, and a run on it with one of the files and no accelerate."""
    place = tmp_path_factory.mktemp("recipes")
    (place / "text").mkdir()
    for number in range(8):
        source = "".join(f"def function{number}_{n}(left, right):\n    return left + {n}\n\n" for n in range(60))
        (place / "text" / f"module{number}.py").write_text(source, "utf-8")
    config = ["--model", "tiny", "--ranks", "2", "--config", "configs/ds_zero1_config.json"]
    _run(sys.executable, "-m", "craken.train", *config, *_flags(place, "direct"))
    return place


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_recipe_trains_by_accelerate_launch_with_both_files(place: Path, stage: int) -> None:
    flags = "FLAGS=" + " ".join(_flags(place, f"ds{stage}"))
    printed = _run("make", "--dry-run", "--always-make", f"test_craken_ds{stage}", flags, f"VENV={sys.prefix}")
    (recipe,) = (line for line in printed.splitlines() if "accelerate launch" in line)
    assert f"configs/accelerate_zero{stage}.yaml" in recipe
    shown = _run("sh", "-c", recipe)
    assert "done: 10 steps" in shown
    assert f"configs/ds_zero{stage}_config.json" in shown
    found, expected = _losses(place / f"ds{stage}"), _losses(place / "direct")
    assert [len(losses) for losses in found.values()] == [10, 2]
    for key, losses in found.items():
        assert losses == pytest.approx(expected[key], rel=1e-3), key  # in bf16
        assert losses[-1] < losses[0] - 0.3, f"{key} did not fall"
