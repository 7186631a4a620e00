"""A model whose weights fit on no rank is built, trained and saved; bringing it together on purpose is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from craken.checkpoint import verify
from tests.scale.larger_than_memory import FORMS, WEIGHT_BYTES, Form

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600  # 40 s on two cores that nobody else uses

pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory figures"),
]


def run_form(name: str, form: Form, folder: Path) -> list[dict[str, Any]]:
    """Run the ranks of a form in fresh processes, and return what each has seen."""
    command = [sys.executable, "-m", "tests.scale.larger_than_memory", name, str(folder), "--gather"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    common = {"WORLD_SIZE": str(form.world_size), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ranks = []
    for rank in range(form.world_size):
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"output{rank}.txt", "wb") as output:
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT))
    try:
        for rank in ranks:
            rank.wait(TIMEOUT_S)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    failed = [index for index, rank in enumerate(ranks) if rank.returncode]
    assert not failed, "\n".join((folder / f"output{index}.txt").read_text()[-3000:] for index in failed)
    return [json.loads((folder / f"rank{index}.json").read_text()) for index in range(form.world_size)]


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_model_that_fits_nowhere_is_built_trained_and_saved(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    seen = run_form(name, form, tmp_path)
    for rank in seen:
        assert rank["weights"] >= 800_000_000
        assert rank["losses"][-1] < 0.9 * rank["losses"][0]
        assert "whole" not in rank, "the whole model came together under the limit"
        if form.offloads:  # the weights are their own masters; Adam has two moments
            assert rank["ledger"]["nvme"] == 3 * rank["weights"] / form.world_size
    assert any("MemoryError" in rank["refused"] for rank in seen)
    (checkpoint,) = (tmp_path / "checkpoint").glob("global_step*")
    assert verify(checkpoint) == []
    saved = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert saved > WEIGHT_BYTES
