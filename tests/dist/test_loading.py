"""What loads into what: weights that are no longer trained, other optimizers, ranks that see different things."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


class TwoLayers(nn.Module):
    def __init__(self, trained: str = "first last", has_buffer: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        for name in ("first", "last"):
            getattr(self, name).requires_grad_(name in trained.split())
        if has_buffer:
            self.register_buffer("mean", torch.full((2,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def start(stage: int, model: nn.Module | None = None, seed: int = 0, **arguments: Any) -> Any:
    import craken

    sections = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "checkpoint": arguments.pop("checkpoint", {}),
    }
    optimizer = {} if "optimizer" in arguments else {"optimizer": arguments.pop("section", SGD)}
    config = {"train_micro_batch_size_per_gpu": 1, **sections, **{key: value for key, value in optimizer.items() if value}}
    if model is None:
        torch.manual_seed(seed)
        model = TwoLayers()
    engine, *_ = craken.initialize(model=model, config=config, **arguments)
    return engine


def take_step(engine: Any) -> float:
    loss = engine(torch.ones(1, 4) * (1 + dist.get_rank())).square().mean()
    engine.backward(loss)
    engine.step()
    return float(loss)


def weights(engine: Any) -> dict[str, list[float]]:
    from craken.zero import GatheredParameters

    with GatheredParameters(engine.module.parameters()):
        return {name: param.flatten().tolist() for name, param in engine.module.named_parameters()}


def trained_and_saved(folder: str, stage: int) -> dict[str, list[float]]:
    engine = start(stage)
    take_step(engine)
    engine.save_checkpoint(folder, tag=7)  # as DeepSpeed's users do
    found = weights(engine)
    engine.destroy()
    return found


def loaded_for_another_use(folder: str, stage: int) -> None:
    expected = trained_and_saved(folder, stage)
    for model, section in ((TwoLayers(""), None), (TwoLayers("last"), SGD)):
        engine = start(stage, model, section=section)
        engine.load_checkpoint(folder, tag=7, load_optimizer_states=False)
        assert weights(engine) == expected
        engine.save_checkpoint(folder, tag=f"frozen-{section is None}")
        engine.destroy()
    engine = start(stage, seed=9)  # trains what was frozen when it was saved
    engine.load_checkpoint(folder, tag="frozen-False")
    assert weights(engine) == expected
    take_step(engine)
    assert weights(engine) != expected
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_load_whether_they_are_and_were_trained_or_not(run_ranks, tmp_path, stage) -> None:
    run_ranks(loaded_for_another_use, 2, str(tmp_path), stage)


def saved_without_frozen(folder: str) -> None:
    from craken.checkpoint import Reader

    engine = start(3, TwoLayers("last"))
    take_step(engine)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    expected = weights(engine)
    engine.destroy()
    assert {name for kind in Reader(folder).kinds() for name in Reader(folder).names(kind)} == {"last.weight", "last.bias"}
    torch.manual_seed(5)
    engine = start(2, TwoLayers("last"), checkpoint={"load_universal": True})
    own = weights(engine)
    with pytest.raises(ValueError, match=r"it lacks first.bias, first.weight\. .* load_module_strict=False"):
        engine.load_checkpoint(folder)
    with mock.patch("craken.engine.loading.log_dist") as said, mock.patch("craken.engine.loading.warn_once") as warned:
        engine.load_checkpoint(folder, load_module_strict=False)
    assert any("does not hold first.bias, first.weight: left as they are" in str(call) for call in said.mock_calls)
    assert "load_universal asks for nothing" in str(warned.mock_calls)
    found = weights(engine)
    assert found == {name: (own if name.startswith("first") else expected)[name] for name in expected}
    assert found != expected
    engine.destroy()


def test_frozen_weights_that_were_left_out_stay_as_they_are(run_ranks, tmp_path) -> None:
    run_ranks(saved_without_frozen, 2, str(tmp_path))


def misfits(folder: str) -> list[str]:
    trained_and_saved(folder, 2)
    wider = TwoLayers()
    wider.last = nn.Linear(6, 3)
    adam = {"type": "AdamW", "params": {"lr": 0.1}}
    messages = []
    for model, section in ((TwoLayers(has_buffer=True), SGD), (wider, SGD), (TwoLayers(), adam)):
        engine = start(2, model, section=section)
        before = weights(engine)
        with pytest.raises(ValueError, match="failed on 2 of 2 ranks") as caught:
            engine.load_checkpoint(folder)
        messages.append(str(caught.value))
        assert weights(engine) == before
        take_step(engine)  # nothing was touched
        engine.destroy()
    return messages


def test_what_does_not_fit_is_named_before_anything_is_touched(run_ranks, tmp_path) -> None:
    buffer, shape, optimizer = run_ranks(misfits, 2, str(tmp_path))[0]
    assert "it lacks mean" in buffer
    assert "it has in other shapes last.bias [2] (here [3]), last.weight [2, 6] (here [3, 6])" in shape
    assert "the checkpoint has the states of SGD, this optimizer is AdamW" in optimizer


def torn(folder: str) -> None:
    expected = trained_and_saved(folder, 2)
    engine = start(2, seed=3)
    take_step(engine)
    engine.save_checkpoint(folder, tag="damaged")
    if dist.get_rank() == 0:
        path = next(Path(folder, "damaged").glob("rank*1*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-1000:-4] = bytes(byte ^ 1 for byte in data[-1000:-4])
        path.write_bytes(data)
    dist.barrier()
    with pytest.raises(ValueError, match="damaged"):
        engine.load_checkpoint(folder, tag="damaged")
    for go_on in (engine, engine.step, lambda *_: engine.save_checkpoint(folder, tag="torn")):
        with pytest.raises(RuntimeError, match="failed halfway; load a checkpoint before anything else"):
            go_on(torch.ones(1, 4))
    engine.load_checkpoint(folder, tag=7)
    assert weights(engine) == expected
    take_step(engine)
    engine.destroy()


def test_an_engine_that_was_half_loaded_goes_on_only_after_another_load(run_ranks, tmp_path) -> None:
    run_ranks(torn, 2, str(tmp_path))


def seen_differently(folder: str) -> None:
    mine = str(Path(folder, str(dist.get_rank())))
    for tag in ("one", "two"):
        engine = start(0, seed=len(tag) + ord(tag[0]))
        take_step(engine)
        engine.save_checkpoint(folder, tag=tag)
        engine.destroy()
    if dist.get_rank() == 0:
        for rank, latest in enumerate(("two", "one")):
            Path(folder, str(rank)).mkdir()
            for tag in ("one", "two"):
                os.symlink(Path(folder, tag), Path(folder, str(rank), tag))
            Path(folder, str(rank), "latest").write_text(latest)
    dist.barrier()
    engine = start(0)
    path, _ = engine.load_checkpoint(mine)  # `latest` of rank 0 counts
    assert path is not None
    assert path.endswith("two")
    with pytest.raises(ValueError, match="expected the same tag on all ranks, got \\['one', 'two'\\]"):
        engine.load_checkpoint(mine, tag=("one", "two")[dist.get_rank()])
    for tags in (("two", None), (None, "two")):  # `latest` of rank 0 names this one too
        with pytest.raises(ValueError, match="expected the same tag on all ranks, got"):
            engine.load_checkpoint(mine, tag=tags[dist.get_rank()])
    if dist.get_rank() == 1:
        Path(mine, "two").unlink()
        os.symlink(Path(folder, "one"), Path(mine, "two"))
    with pytest.raises(ValueError, match=r"ranks \[1\] see another checkpoint"):
        engine.load_checkpoint(mine, tag="two")
    take_step(engine)
    engine.destroy()


def test_ranks_load_the_same_checkpoint_or_none(run_ranks, tmp_path) -> None:
    run_ranks(seen_differently, 2, str(tmp_path))


class Scaled(torch.optim.Optimizer):
    """Keeps one scale for four elements of the part it is given, as optimizers with 8-bit states do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.grad is not None and param.numel():
                state = self.state[param]
                padded = torch.nn.functional.pad(param.grad.flatten(), (0, -param.numel() % 4))
                state["scales"] = padded.view(-1, 4).abs().amax(1)
                state["steps"] = state.get("steps", 0) + 1
                param.sub_(param.grad.sign(), alpha=0.01)


def scales_of(engine: Any) -> list[Any]:
    return [
        {key: value.tolist() if isinstance(value, Tensor) else value for key, value in state.items()}
        for state in engine.optimizer.state.values()
    ]


def parts_of_ranks(folder: str, saves: bool) -> None:
    model = TwoLayers()
    engine = start(2, model, optimizer=Scaled(model.parameters()))
    if saves:
        take_step(engine)
        engine.save_checkpoint(folder)
        saved = scales_of(engine)
        engine.destroy()
        model = TwoLayers()
        engine = start(2, model, optimizer=Scaled(model.parameters()))
        engine.load_checkpoint(folder)
        assert scales_of(engine) == saved
        everyones: list[Any] = [None, None]
        dist.all_gather_object(everyones, saved)
        assert everyones[0] != everyones[1]
    else:
        with pytest.raises(ValueError, match="holds optimizer states that each of 2 ranks had"):
            engine.load_checkpoint(folder)
        engine.load_checkpoint(folder, load_optimizer_states=False)
        take_step(engine)
    engine.destroy()


def test_states_that_belong_to_a_ranks_part_return_to_that_rank(run_ranks, tmp_path) -> None:
    run_ranks(parts_of_ranks, 2, str(tmp_path), True)
    run_ranks(parts_of_ranks, 1, str(tmp_path), False)


def failing_on_one_rank(folder: str) -> None:
    engine = start(2)
    take_step(engine)
    target = Path(folder, "a_file")
    if dist.get_rank() == 0:
        target.write_text("")
    dist.barrier()
    with pytest.raises(OSError, match="failed on 1 of 2 ranks: rank 0"):
        engine.save_16bit_model(target)
    if dist.get_rank() == 1:
        engine.lr_scheduler = object()  # cannot be saved
    else:
        engine.lr_scheduler = None
    with pytest.raises(RuntimeError, match="failed on 1 of 2 ranks: rank 1: AttributeError"):
        engine.save_checkpoint(folder)
    engine.lr_scheduler = None
    engine.save_checkpoint(folder)
    engine.destroy()


def test_what_fails_on_one_rank_is_an_error_on_all(run_ranks, tmp_path) -> None:
    run_ranks(failing_on_one_rank, 2, str(tmp_path))
