"""The machine report, whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launch import programs


def test_the_report_runs_and_its_two_ranks_meet(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "craken.cli", "doctor"]
    done = subprocess.run(
        command, cwd=tmp_path, env=programs.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "gloo" in line and "met over" in line)
    assert "[OK]" in line, done.stderr
    assert "torch" in done.stdout
    assert not list(tmp_path.iterdir())
