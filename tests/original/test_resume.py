"""Moving over in the middle of a run: imported checkpoints of every kind go on as the original itself went on."""

from __future__ import annotations

import base64
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from craken.checkpoint import Reader, verify
from craken.checkpoint.original.files import read_original
from craken.checkpoint.original.importing import import_original
from craken.checkpoint.original.replicated import trained_by_all
from tests.original.cases import CASES, SAVED_AT, STEPS_AFTER, Model, config_of, groups_of, scheduler_of, train

FILES = Path(__file__).parent / "files"
# relative, on losses near 5: fp32 differs by the order of sums, the others by roundings of weights and gradients
TOLERANCE = {"fp32": 2e-6, "bf16": 1e-3, "fp16": 5e-4}  # ten, four and four times what was seen

# At stage 0 the original divides gradients by the loss scale without having multiplied the loss with it: its moments
# are smaller by the scale, and what it does next is nothing to follow. The weights and the next loss are right.
NUM_COMPARED = {"fp16-stage0": 1}
WITHOUT_ACCESSORS = ("bf16-stage0", "fp16-stage0", "fp16-stage0-static", "fp32-stage2", "sgd-bf16-stage0")
WITHOUT_ACCESSORS += ("lamb-fp16-stage0",)
MATRICES = ("up.weight", "down.weight")  # those that Muon updates


def unpack(name: str, folder: Path) -> Path:
    """Return a new folder in `folder` with what the original saved in case `name`."""
    with tarfile.open(FILES / f"{name}.tar.xz") as tar:
        safely = (
            {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        )  # Python 3.10 and 3.11 from .12 and .4 on
        tar.extractall(folder / "original", **safely)
    return folder / "original"


def told(name: str) -> dict[str, Any]:
    """Return what the original told about case `name` when it saved, and its next losses."""
    return json.loads((FILES / f"{name}.json").read_text())


def names_of(name: str) -> list[list[str]] | None:
    """Return the names that have to be given for a case: where nothing in its file says which weights are trained."""
    if (CASES[name].stage, CASES[name].precision) != (0, "fp32"):
        return None
    model = Model()
    name_of = {param: name for name, param in model.named_parameters()}
    return [[name_of[param] for param in group["params"]] for group in groups_of(CASES[name], model)]


@pytest.fixture(scope="session")
def imported(tmp_path_factory) -> Any:
    """Return `imported(name) -> folder` that imports each case once."""
    done: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            import_original(unpack(name, folder), folder / "ours", names=names_of(name))
            done[name] = folder / "ours"
        return done[name]

    return of


def go_on(folder: str, name: str) -> dict[int, dict[str, Any]]:
    """Resume a case at each stage, on random weights, and train on."""
    import craken

    case, rank, num_ranks = CASES[name], dist.get_rank(), dist.get_world_size()
    found = {}
    for stage in range(4):
        torch.manual_seed(99)
        model = Model()
        engine, *_ = craken.initialize(
            model=model,
            model_parameters=groups_of(case, model),
            config=config_of(case, stage, num_ranks),
            lr_scheduler=scheduler_of(case),
        )
        _, client = engine.load_checkpoint(folder)
        if name == "elastic":  # says nothing about the learning rate at the time
            for group, rate in zip(engine.optimizer.param_groups, told(name)["lr"], strict=True):
                group["lr"] = rate
        found[stage] = {
            "client": client,
            "lr": [group["lr"] for group in engine.optimizer.param_groups],
            "loss_scale": engine.loss_scaler.value,
            "global_steps": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
            "num_forwards": float(model.num_forwards),
            "losses": train(engine, case, range(SAVED_AT, SAVED_AT + STEPS_AFTER), rank, num_ranks),
        }
        engine.destroy()
    return found


# what one rank adds, the other optimizers and releases need not show again
ON_ONE_RANK = [name for name, case in CASES.items() if case.kind == "AdamW" and case.release == "0.19.6"]


@pytest.mark.parametrize(("name", "num_ranks"), [*((name, 1) for name in ON_ONE_RANK), *((name, 2) for name in CASES)])
def test_every_stage_goes_on_with_the_losses_of_the_original(run_ranks, imported, name, num_ranks) -> None:
    expected, by_rank = told(name), run_ranks(go_on, num_ranks, str(imported(name)), name)
    for stage in range(4):
        ranks = [found[stage] for found in by_rank]
        losses = np.mean([rank["losses"] for rank in ranks], axis=0)
        assert np.isfinite(losses).all()
        compared = slice(NUM_COMPARED.get(name, STEPS_AFTER))
        tolerance = TOLERANCE[CASES[name].precision]
        np.testing.assert_allclose(losses[compared], expected["losses"][compared], rtol=tolerance, atol=0)
        for rank in ranks:
            for key in ("lr", "loss_scale", "global_steps", "skipped_steps", "num_forwards"):
                assert rank[key] == expected[key], (stage, key)
            client = rank["client"]
            assert (client["epoch"], client["pair"], client["best"]) == (2, (1, "a"), 0.25)
            assert client["seen"].tolist() == [0, 1, 2]
            assert client["at"].tolist() == [0, 1, 2, 3]
            assert set(client) == {"epoch", "pair", "best", "seen", "at"}


def load_weights(folder: str) -> dict[str, Any]:
    """Return an fp32 engine's weights after it has loaded `folder`."""
    import craken

    case = CASES["fp32-stage0"]
    model = Model()
    config = config_of(case, 2, dist.get_world_size())
    engine, *_ = craken.initialize(model=model, model_parameters=groups_of(case, model), config=config)
    engine.load_checkpoint(folder, load_module_only=True)
    return {name: param.tolist() for name, param in model.named_parameters()}


def test_weights_alone_stay_in_their_file_and_in_their_dtype_until_they_are_written(run_ranks, tmp_path) -> None:
    folder = unpack("bf16-stage0", tmp_path)
    file = folder / "global_step5" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "optimizer": None}, file)
    model = read_original(file)
    weights = {name: value for name, value in model["module"].items() if name != "head.weight"}
    trained = trained_by_all(file, weights, None, None)
    assert [piece.tensor.data_ptr() for piece in trained.pieces] == [value.data_ptr() for value in weights.values()]
    import_original(folder, tmp_path / "ours")
    reader = Reader(tmp_path / "ours")
    for name in reader.names("weight"):
        assert torch.equal(reader.read_full("weight", name), weights[name])
        assert weights[name].dtype == torch.bfloat16
    for loaded in run_ranks(load_weights, 2, str(tmp_path / "ours")):
        assert loaded == {name: value.float().tolist() for name, value in weights.items() if name in loaded}
        assert len(loaded) == 9


@pytest.mark.parametrize("name", CASES)
def test_masters_and_moments_are_those_the_original_tells_to_the_bit(imported, name) -> None:
    reader, expected = Reader(imported(name)), told(name)["tensors"]
    assert verify(reader.path) == []
    assert expected or name in WITHOUT_ACCESSORS
    for key, text in expected.items():
        kind, parameter = key.split(":")
        value = reader.read_full(kind if kind == "weight" else f"optimizer.{kind}", parameter)
        assert value.dtype == torch.float32
        assert value.numpy().tobytes() == base64.b64decode(text), key
    trained = [name for name, param in Model().named_parameters() if param.requires_grad]
    assert sorted(reader.names("weight")) == sorted(trained)
    for state in CASES[name].states:
        is_matrix_state = state == "momentum_buffer" if CASES[name].kind == "Muon" else None
        of = [name for name in trained if is_matrix_state in (None, name in MATRICES)]
        assert sorted(reader.names(f"optimizer.{state}")) == sorted(of)
    stored = {kind.removeprefix("optimizer.") for kind in reader.kinds() if kind.startswith("optimizer.")}
    assert stored == set(CASES[name].states)
    assert sorted(reader.names("frozen")) == ["frozen.bias", "frozen.weight"]
