"""The guard around a rank's script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from craken.launch.guard import ERROR_FOLDER
from craken.launch.guard import __file__ as guard_path


def _run(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(text)
    environment = {**os.environ, ERROR_FOLDER: str(folder), "RANK": "3"}
    command = [sys.executable, guard_path, *(words or ["script.py", "a"])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_an_exception_is_filed_with_the_scripts_frames_only(tmp_path: Path) -> None:
    done = _run(tmp_path, "def f():\n    raise KeyError('x')\nf()\n")
    record = json.loads((tmp_path / "3.json").read_text())
    assert (done.returncode, done.stderr, record["type"], record["message"]) == (1, "", "KeyError", "'x'")
    assert record["traceback"].count("File ") == 2
    assert "guard.py" not in record["traceback"]


def test_a_syntax_error_is_filed_too(tmp_path: Path) -> None:
    assert _run(tmp_path, "def :\n").returncode == 1
    assert json.loads((tmp_path / "3.json").read_text())["type"] == "SyntaxError"


def test_an_exit_code_is_the_scripts(tmp_path: Path) -> None:
    done = _run(tmp_path, "import sys; sys.exit(4)")
    assert (done.returncode, list(tmp_path.glob("*.json"))) == (4, [])


def test_the_script_is_main_and_can_be_pickled_from(tmp_path: Path) -> None:
    text = """
import dataclasses, multiprocessing, pickle, sys
@dataclasses.dataclass
class Point:
    x: int
def double(x):
    return 2 * x
if __name__ == "__main__":
    assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [4]), sys.argv)
"""
    assert _run(tmp_path, text).stdout == "[8] ['script.py', 'a']\n"


def test_a_module_runs_as_under_python_m(tmp_path: Path) -> None:
    done = _run(tmp_path, "import sys; print(__name__, sys.argv[1:])", "-m", "script", "b")
    assert done.stdout == "__main__ ['b']\n"


def test_code_that_runs_at_exit_still_sees_its_globals(tmp_path: Path) -> None:
    done = _run(tmp_path, "import atexit\nword = 'kept'\natexit.register(lambda: print(word))")
    assert done.stdout == "kept\n"


def test_without_a_launcher_the_traceback_is_printed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise KeyError('x')")
    environment = {key: value for key, value in os.environ.items() if key != ERROR_FOLDER}
    done = subprocess.run(
        [sys.executable, guard_path, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "KeyError: 'x'" in done.stderr


def test_a_forked_child_does_not_speak_for_the_rank(tmp_path: Path) -> None:
    done = _run(tmp_path, "import os\nif os.fork() == 0:\n    raise KeyError('x')\nos.wait()\n")
    assert "KeyError: 'x'" in done.stderr
    assert not list(tmp_path.glob("*.json"))
