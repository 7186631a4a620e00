"""What `make test_craken_ds*` starts: the recipe as make prints it, through `accelerate launch`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.clients_common import ROOT, fresh_environment


@pytest.mark.clients
@pytest.mark.launches
@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_the_recipe_trains_by_accelerate_launch_with_both_files(tmp_path: Path) -> None:
    flags = f"FLAGS=--steps 2 --eval-every 2 --cache {tmp_path / 'cache'} --output {tmp_path / 'out'}"
    printed = subprocess.run(
        ["make", "--dry-run", "--always-make", "test_craken_ds3", flags, f"VENV={sys.prefix}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (recipe,) = (line for line in printed.splitlines() if "accelerate launch" in line)
    assert "configs/accelerate_zero3.yaml" in recipe
    assert "configs/ds_zero3_config.json" in recipe
    done = subprocess.run(
        ["sh", "-c", recipe],
        cwd=ROOT,
        env=fresh_environment(),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "done: 2 steps" in done.stdout
    assert "configs/ds_zero3_config.json" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
