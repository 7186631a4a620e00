"""What a checkpoint says about itself."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from craken.checkpoint import CheckpointNotFound
from craken.checkpoint.contents import brief, describe
from craken.checkpoint.state_codec import encode_state
from tests.unit.checkpoint.models import save_model, two_layers
from tests.unit.checkpoint.ranks import numbers


def test_the_index_tells_progress_topology_and_sizes(tmp_path: Path) -> None:
    save_model(tmp_path, two_layers(), tag="step9")
    save_model(
        tmp_path,
        two_layers(),
        tag="step10",
        frozen={"position.weight": numbers(5, 6).bfloat16()},
        optimizer=two_layers(),
        global_steps=10,
        zero_stage=3,
        loss_scale={"scale": 256.0},
        optimizer_settings=None,
        lr_scheduler=None,
        client={"epoch": 3, "table": torch.ones(3)},
    )
    found = describe(tmp_path)
    assert (found.tag, found.tags, found.latest, found.num_ranks) == ("step10", ["step9", "step10"], "step10", 3)
    assert found.num_parameters == sum(weight.numel() for weight in two_layers().values()) + 30
    assert found.progress == {"global_steps": 10, "skipped_steps": None, "micro_steps": None, "zero_stage": 3}
    assert (found.loss_scale, found.lr_scheduler, found.client_state) == ({"scale": 256.0}, None, ["epoch", "table"])
    kinds = {kind.kind: kind for kind in found.kinds}
    assert (kinds["frozen"].num_bytes, kinds["frozen"].dtypes) == (60, ["BF16"])
    assert kinds["optimizer.exp_avg"].num_bytes == kinds["weight"].num_bytes == 4 * (66 + 48 + 8 + 48)
    assert found.optimizer_states == ["exp_avg"]
    assert [(file.name, file.problem) for file in found.files] == [
        (f"rank-0000{r}.safetensors", None) for r in range(3)
    ]
    position = next(tensor for tensor in found.tensors if tensor.name == "position.weight")
    assert (position.shape, position.num_pieces) == ([5, 6], 3)
    assert describe(tmp_path / "step9").tag == describe(tmp_path, "step9").tag == "step9"


def test_a_missing_file_is_told_and_a_missing_tag_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, two_layers())
    (path / "rank-00001.safetensors").unlink()
    assert [file.problem for file in describe(tmp_path).files] == [None, "is missing", None]
    with pytest.raises(CheckpointNotFound, match="global_step1"):
        describe(tmp_path, "other")


def test_states_are_told_in_few_words() -> None:
    state = {
        "betas": (0.9, 0.999),
        "history": list(range(100)),
        "weights": torch.ones(3),
        "array": np.zeros(2),
        "by number": OrderedDict([(1, "one")]),
        "largest": float("inf"),
        "nothing": None,
    }
    assert brief(encode_state(state, root="x").value) == {
        "betas": [0.9, 0.999],
        "history": [0, 1, 2, 3, 4, 5, "... 100 in all"],
        "weights": "(tensor)",
        "array": "(array)",
        "by number": {"1": "one"},
        "largest": "inf",
        "nothing": None,
    }
