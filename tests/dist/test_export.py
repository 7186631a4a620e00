"""What an engine saved is what `craken export` and `zero_to_fp32` write, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from craken import cli
from craken.checkpoint.export.fp32 import get_fp32_state_dict_from_zero_checkpoint
from tests.parity.case import Case
from tests.parity.model import Traits, batch, tiny_gpt


def train_and_save(folder: str, stage: int, precision: str) -> dict[str, torch.Tensor] | None:
    """Return the weights, whole, as the engine computes with them."""
    import craken

    case = Case(precision, 2, traits=Traits(has_tied_head=True))
    model = tiny_gpt(case.traits)
    model.register_buffer("kept", torch.arange(3.0))
    engine, *_ = craken.initialize(model=model, config=case.config(stage))
    for micro in range(2):
        engine.backward(engine(batch(0, micro, dist.get_rank())))
        engine.step()
    engine.save_checkpoint(folder)
    with craken.GatheredParameters(engine.module.parameters()):
        state = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    engine.destroy()
    return state if dist.get_rank() == 0 else None


@pytest.mark.parametrize(("stage", "num_ranks", "precision"), [(3, 2, "bf16"), (3, 2, "fp32"), (1, 4, "bf16")])
def test_an_export_equals_the_gathered_weights(run_ranks, tmp_path: Path, capsys, stage, num_ranks, precision) -> None:
    saved, out = tmp_path / "saved", tmp_path / "out"
    state = run_ranks(train_and_save, num_ranks, str(saved), stage, precision)[0]
    assert cli.main(["export", str(saved), str(out), "--dtype", precision]) == 0
    found = load_file(out / "model.safetensors")
    assert set(found) == set(state) - {"head.weight"}  # tied: written once
    for name, value in found.items():
        assert torch.equal(value, state[name]), name
    whole = get_fp32_state_dict_from_zero_checkpoint(saved)
    assert set(whole) == set(state)
    assert whole["head.weight"] is whole["embed.weight"]
    for name, value in whole.items():
        # masters: the weights that the engine computes with are these, rounded
        assert torch.equal(value.to(state[name].dtype), state[name]), name
    assert (saved / "zero_to_fp32.py").exists()
    assert cli.main(["inspect", str(saved), "--verify"]) == 0
    text = capsys.readouterr().out
    assert f"saved by  {num_ranks} ranks" in text
    assert f"zero stage  {stage}" in text
    assert "every block of every file is as it was written" in text
