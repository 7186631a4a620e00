"""The README keeps its word: its example runs as printed, its files and commands exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_library_example_runs_as_printed(tmp_path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 24
    (tmp_path / "example.py").write_text(example + "\nassert engine.global_steps == 8\n", "utf-8")
    launch = "import sys; from craken.launch import launch_local; sys.exit(launch_local(sys.argv[1:], 2))"
    result = subprocess.run(
        [sys.executable, "-c", launch, sys.executable, "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr  # 256 samples / 2 ranks / 8 a micro-batch = 16 micro-batches = 8 steps
    assert (tmp_path / "checkpoints").is_dir()


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_every_link_to_a_file_leads_to_one(page) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([\w]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make (\w+)", README)) | set(re.findall(r"`(craken_ds\w+)`", README))
    assert named <= targets, named - targets


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configuration_files_say_the_same_for_every_way_to_start(stage) -> None:
    import yaml

    from craken.config import load_config, resolve_batch

    file = json.loads((ROOT / f"configs/ds_zero{stage}_config.json").read_text())
    page = yaml.safe_load((ROOT / f"configs/accelerate_zero{stage}.yaml").read_text())
    inside = page["deepspeed_config"]
    assert "deepspeed_config_file" not in inside  # accelerate refuses a JSON beside values
    assert file["zero_optimization"]["stage"] == inside["zero_stage"] == stage
    assert file["gradient_accumulation_steps"] == inside["gradient_accumulation_steps"] == 8
    assert file["gradient_clipping"] == inside["gradient_clipping"] == 0.3
    assert page["mixed_precision"] == "bf16"
    assert file["bf16"]["enabled"]
    offload = file["zero_optimization"].get("offload_optimizer", {"device": "none"})["device"]
    assert offload == inside["offload_optimizer_device"]
    assert resolve_batch(load_config(file), 2).accumulation_steps == 8
