"""Reading a configuration needs no torch and next to no time."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, time
start = time.process_time()
import craken.config
craken.config.load_config({"train_batch_size": 8})
print(time.process_time() - start, "torch" in sys.modules, "numpy" in sys.modules)
"""


def test_importing_the_configuration_loads_no_torch_and_takes_under_three_tenths_of_a_second() -> None:
    answers = [
        subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True) for _ in range(5)
    ]
    cpu_s, *loaded = min((answer.stdout.split() for answer in answers), key=lambda words: float(words[0]))
    assert loaded == ["False", "False"]
    assert float(cpu_s) < 0.3
