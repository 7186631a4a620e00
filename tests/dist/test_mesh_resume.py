"""Checkpoints of a model that is sharded over some ranks and repeated over others, or has second copies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.parity.case import Case, Run
from tests.parity.mesh_run import HPZ, MICS, PLAIN_TRAITS, PSI, Trained, elements, flat, runs_of, train, train_each
from tests.parity.model import Traits, batch, tiny_gpt
from tests.parity.plain import weights_of
from tests.parity.side_by_side import Pair, error, inputs
from tests.parity.test_losses import assert_ranks_agree, mean_losses


def trained_engine(zero: dict[str, Any], num_steps: int, folder: str = "") -> Any:
    """Return an engine that has loaded `folder`, if given, and then trained."""
    import craken

    case = Case(world_size=dist.get_world_size())
    config = case.config(3)
    config["zero_optimization"].update(zero)
    engine, *_ = craken.initialize(model=tiny_gpt(case.traits), config=config)
    if folder:
        assert engine.load_checkpoint(folder)[0]
    for step in range(num_steps):
        engine.backward(engine(batch(10 + step, 0, 0)))  # the same on every rank, however many there are
        engine.step()
    return engine


def save_and_go_on(folder: str, zero: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights when they were saved, and those a step after they were loaded back."""
    engine = trained_engine(zero, 2)
    engine.save_checkpoint(folder)
    saved = weights_of(engine.module)
    engine.destroy()
    return saved, load_and_go_on(folder, zero)[1]


def load_and_go_on(folder: str, zero: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights as they were loaded, and those a step later."""
    engine = trained_engine(zero, 0, folder)
    loaded = weights_of(engine.module)
    engine.destroy()
    engine = trained_engine(zero, 1, folder)
    later = weights_of(engine.module)
    engine.destroy()
    return loaded, later


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((MICS, 4), ({}, 2)), ((MICS, 4), ({"stage": 1}, 4)), (({}, 2), (MICS, 4)), ((MICS, 4), (HPZ, 4))],
    ids=["mics to 2 ranks", "mics to stage 1", "2 ranks to mics", "mics to hpz"],
)
def test_a_checkpoint_continues_on_another_mesh(run_ranks, tmp_path, saved, loaded) -> None:
    (zero, world_size), (other_zero, other_size) = saved, loaded
    weights, expected = run_ranks(save_and_go_on, world_size, str(tmp_path), zero)[0]
    for came, later in run_ranks(load_and_go_on, other_size, str(tmp_path), other_zero):
        for name, weight in weights.items():
            assert torch.equal(came[name], weight), name
            torch.testing.assert_close(later[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)


def reload_into_running(folder: str) -> None:
    """An engine that has gathered its weights, frozen ones too, takes others: what it computes next is of those."""
    from craken.zero import GatheredParameters

    def loss() -> float:
        with torch.no_grad():
            return engine(batch(0, 0, 0)).item()

    engine = trained_engine(HPZ, 2)
    engine.save_checkpoint(folder)
    before = loss()
    engine.backward(engine(batch(0, 0, 0)))
    engine.step()
    trained = loss()
    frozen = engine.module.position.weight
    with GatheredParameters(frozen, modifier_rank=1), torch.no_grad():
        frozen.fill_(float(dist.get_rank()))
    assert len({before, trained, loss()}) == 3, "a step or an edit did not show"
    engine.load_checkpoint(folder)
    assert loss() == before
    engine.destroy()


def test_steps_edits_and_loading_outdate_second_copies(run_ranks, tmp_path) -> None:
    run_ranks(reload_into_running, 4, str(tmp_path))


def saved_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_replicas_are_saved_once(run_ranks, tmp_path) -> None:
    sizes = []
    for name, zero in (("plain", {}), ("mics", MICS)):
        run_ranks(save_and_go_on, 4, str(tmp_path / name), zero)
        sizes.append(saved_bytes(tmp_path / name))
    assert sizes[1] <= 1.05 * sizes[0]
