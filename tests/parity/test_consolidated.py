"""Whole weights on rank 0's host: right, each with memory of its own, tied ones once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.parity.case import Case
from tests.parity.model import Traits, batch, tiny_gpt
from tests.parity.plain import weights_of


def consolidate(folder: str, gathers: bool) -> None:
    import craken

    case = Case("bf16", 2, traits=Traits(has_tied_head=True))
    model = tiny_gpt(case.traits)
    model.register_buffer("kept", torch.arange(3.0))
    config = case.config(3)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gathers
    engine, *_ = craken.initialize(model=model, config=config)
    engine.backward(engine(batch(0, 0, dist.get_rank())))
    engine.step()
    state = engine._zero3_consolidated_16bit_state_dict()
    trained = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    saved = [engine.save_16bit_model(folder, name) for name in ("model.safetensors", "pytorch_model.bin")]
    expected = weights_of(model)
    assert saved == [gathers, gathers]
    if dist.get_rank():
        assert state is None
        return
    assert set(state) == {*expected, "head.weight", "kept"}
    assert state["head.weight"] is state["embed.weight"]
    assert set(state) - set(trained) == {"position.weight"}
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state) - 1
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name
    if gathers:
        loaded = load_file(f"{folder}/model.safetensors")
        whole = torch.load(f"{folder}/pytorch_model.bin", weights_only=True)
        assert set(whole) == set(state)
        assert all(torch.equal(whole[name], state[name]) for name in state)
        assert all(torch.equal(value, state[name]) for name, value in loaded.items())
        assert set(state) - set(loaded) <= {"head.weight", "embed.weight"}
    engine.destroy()


@pytest.mark.parametrize("gathers", [True, False])
def test_whole_weights_come_together_on_rank_0(run_ranks, tmp_path: Path, gathers) -> None:
    run_ranks(consolidate, 2, str(tmp_path), gathers)


def below_stage_3() -> None:
    import craken

    engine, *_ = craken.initialize(model=tiny_gpt(), config=Case("bf16", 2).config(2))
    with pytest.raises(ValueError, match="below stage 3"):
        engine._zero3_consolidated_16bit_state_dict()
    engine.destroy()


def test_below_stage_3_there_is_nothing_to_bring_together(run_ranks) -> None:
    run_ranks(below_stage_3, 2)
