"""Reading a configuration needs no torch and few modules: 0.15 s of imports, most of them pydantic's."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
before = len(sys.modules)
import craken.config
craken.config.load_config({"train_batch_size": 8})
print(len(sys.modules) - before, "torch" in sys.modules, "numpy" in sys.modules)
"""
MOST_MODULES = 300  # 194 of them on Python 3.11; torch brings over a thousand


def test_reading_a_configuration_loads_no_torch_and_few_modules() -> None:
    answer = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    num_modules, *loaded = answer.stdout.split()
    assert loaded == ["False", "False"]
    assert int(num_modules) < MOST_MODULES
