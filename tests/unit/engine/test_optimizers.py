"""The check of a config's optimizer, which `craken train` makes before a rank starts, costs no import of a compiler."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import torch
from craken.api import check_config
add = torch.optim.Optimizer.add_param_group
for name in ("AdamW", "Muon", "SGD"):
    check_config({"train_batch_size": 2, "optimizer": {"type": name}}, 2)
print("torch._dynamo" in sys.modules, torch.optim.Optimizer.add_param_group is add)
"""


def test_checking_an_optimizer_loads_no_compiler_and_leaves_torch_as_it_was() -> None:
    answer = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert answer.stdout.split() == ["False", "True"]
