"""What only stage 3 does: weights come for a use and go after it, whoever asks for them."""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.parity.side_by_side import Pair, error, inputs, value

WIDTH, LAYERS = 64, 12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Tower(nn.Module):
    """Blocks one after another, each of its own size on the wire; recomputed in backward if asked."""

    def __init__(self, recompute: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 5)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, WIDTH - x.shape[-1]))
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x.requires_grad_(), use_reentrant=self.recompute == "reentrant")
            else:
                x = block(x)
        return self.head(x)


def tower(recompute: str = "", frozen: bool = False) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Tower(recompute)
    if frozen:
        for block in model.blocks:
            block.up.requires_grad_(False)
    return model


def watch_live(model: nn.Module) -> list[int]:
    """Return a list to which the elements that are whole are added at each block's forward and backward."""
    seen: list[int] = []

    def note(*_: Any) -> None:
        seen.append(sum(param.numel() for param in model.parameters()))

    for block in model.blocks:
        block.up.register_forward_hook(lambda module, inputs, output: note())
        block.register_full_backward_hook(lambda module, got, gave: note())
    return seen


def live_weights(recompute: str, frozen: bool) -> list[int]:
    """Train a few steps beside the twin, and return how many elements were whole at once, and how many there are."""
    model = tower(recompute, frozen)
    total, block = (sum(param.numel() for param in part.parameters()) for part in (model, model.blocks[0]))
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1}
    pair = Pair(3, model, config={"zero_optimization": zero})
    assert all(param.shape == (0,) for param in model.parameters())
    seen = watch_live(model)
    for step in range(3):
        pair.step_both(step)
        assert all(param.shape == (0,) for param in model.parameters())
    pair.assert_same_weights(atol=1e-5)  # Adam divides roundings by small gradients
    pair.close()
    return [max(seen), block, total]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "half frozen"])
@pytest.mark.parametrize("recompute", ["", "reentrant", "not reentrant"])
def test_at_most_two_blocks_are_whole_at_once(run_ranks, recompute, frozen) -> None:
    for most, block, total in run_ranks(live_weights, 2, recompute, frozen):
        assert most <= 2 * block, f"{most} of {total} elements were whole at once; a block has {block}"


def other_ways() -> None:
    """Forwards in another order, without backward, with exceptions, on a bare submodule: the next step is right."""
    pair = Pair(3, tower())
    x = inputs(0, pair.rank)
    pair.step_both(0)
    with torch.no_grad():
        pair.engine(x)
    pair.model.blocks[3](torch.zeros(1, WIDTH))  # with a graph that nobody uses
    with pytest.raises(RuntimeError):
        pair.engine(torch.zeros(1, 6, dtype=torch.long))
    pair.engine(x)  # a loss that is never used
    pair.step_both(1)
    for block in reversed(pair.model.blocks[4:]):
        with torch.no_grad():
            block(torch.zeros(1, WIDTH))
    pair.step_both(2)
    assert all(param.shape == (0,) for param in pair.model.parameters())
    pair.assert_same_weights(atol=1e-5)  # Adam divides roundings by small gradients
    pair.close()


def test_forwards_of_other_kinds_between_steps_do_no_harm(run_ranks) -> None:
    run_ranks(other_ways, 2)


def two_forwards_before_a_backward() -> None:
    pair = Pair(3, tower())
    for step in range(2):
        first = error(pair.engine(inputs(step, pair.rank)))
        second = error(pair.engine(inputs(step + 10, pair.rank)))
        pair.engine.backward(first + second)
        pair.engine.step()
        pair.twin_backward_of(
            lambda rank, step=step: error(pair.twin(inputs(step, rank))) + error(pair.twin(inputs(step + 10, rank)))
        )
        pair.twin_step()
    pair.assert_same_weights(atol=1e-5)  # Adam divides roundings by small gradients
    pair.close()


def test_two_forwards_may_come_before_one_backward(run_ranks) -> None:
    run_ranks(two_forwards_before_a_backward, 2)


def edit_gathered() -> None:
    import craken
    from craken.zero import GatheredParameters

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = craken.initialize(model=model, config=config)
    first, last = model[0].weight, model[1].weight
    before = value(first)
    with GatheredParameters([first, None, first, torch.ones(1)]):
        assert first.shape == first.ds_shape == (5, 6)
        with GatheredParameters(first, modifier_rank=0):  # gathered already: left to the outer one
            first.data.fill_(1.0)
    assert first.shape == (0,)
    assert torch.equal(value(first), before), "edits without a modifier stayed"
    everything = list(model.parameters())
    with GatheredParameters(everything if dist.get_rank() else everything[::-1], modifier_rank=1):
        first.data.fill_(dist.get_rank() + 1)
        last.data = torch.full((3, 5), 7.0 * dist.get_rank(), dtype=last.dtype)
    assert value(first).unique().tolist() == [2.0]
    assert value(last).unique().tolist() == [7.0]
    with pytest.raises(KeyError), GatheredParameters(first):
        raise KeyError
    assert first.shape == (0,)
    engine.backward(engine(torch.ones(1, 6, dtype=torch.bfloat16)).float().sum())
    engine.step()
    assert value(first).unique().tolist() == [2.0], "the master did not take the edit"
    engine.destroy()


def test_gathered_parameters_can_be_read_and_edited(run_ranks) -> None:
    run_ranks(edit_gathered, 2)


def step_inside() -> None:
    """A step and a load inside of GatheredParameters show the new values."""
    from craken.zero import GatheredParameters

    pair = Pair(3, tower(frozen=True))
    weight, frozen = pair.model.blocks[0].down.weight, pair.model.blocks[0].up.weight
    with GatheredParameters([weight, frozen]):
        before = weight.detach().clone()
        pair.step_both(0)
        assert not torch.equal(weight, before), "the whole copy is older than the shards"
        inside = weight.detach().clone()
    assert torch.equal(value(weight), inside)
    with GatheredParameters(pair.model.parameters()):
        pair.model.load_state_dict({name: torch.full_like(one, 0.5) for name, one in pair.model.state_dict().items()})
    assert value(frozen).unique().tolist() == value(weight).unique().tolist() == [0.5]
    pair.close()


def test_whole_copies_follow_the_shards(run_ranks) -> None:
    run_ranks(step_inside, 2)


class Thinned(Tower):
    """Runs the first block of every few."""

    def forward(self, x: Tensor, *, every: int = 1) -> Tensor:
        x = F.pad(x, (0, WIDTH - x.shape[-1]))
        for block in self.blocks[::every]:
            x = block(x)
        return self.head(x)


def drop_layers() -> list[set[str]]:
    """Drop other layers from step to step, on all ranks, with an evaluation of all between the micro-batches.

    Returns the blocks that each micro-batch gathered.
    """
    from craken.comm import event_log

    with torch.random.fork_rng():
        torch.manual_seed(3)
        pair, gathered = Pair(3, Thinned(), accumulation=2), []
    for step, every in enumerate((1, 3, 3, 2, 1)):
        for micro in range(2):
            with torch.no_grad():
                pair.engine(inputs(0, pair.rank))
            with event_log() as events:
                pair.engine.backward(error(pair.engine(inputs(2 * step + micro, pair.rank), every=every)))
            gathers = [event.label for event in events if event.op == "all_gather"]
            gathered.append({label.split(".")[1] for label in gathers if label.startswith("blocks.")})
            pair.engine.step()
            pair.twin_backward(2 * step + micro, factor=0.5, every=every)
        pair.twin_step()
    pair.assert_same_weights(atol=1e-5)
    pair.close()
    return gathered


def test_layers_may_be_dropped_on_all_ranks_and_the_new_order_is_learnt(run_ranks) -> None:
    for gathered in run_ranks(drop_layers, 2):
        assert len(gathered[0]) == LAYERS
        assert gathered[5] == {"0", "3", "6", "9"}, "what the pass before did not use was gathered"


def keep_an_alias() -> None:
    """A step and an alias kept beyond it, which would end the process."""
    with patch.dict("os.environ", {"CRAKEN_DEBUG_FREED": "1"}):
        pair = Pair(3, tower())
    kept: list[Tensor] = []
    weight = pair.model.blocks[0].up.weight
    hook = pair.model.blocks[0].up.register_forward_hook(lambda *_: kept.append(weight.detach().t()))
    for step in range(2):
        pair.step_both(step)
        assert all(alias.isnan().all() for alias in kept)
    hook.remove()
    assert len(kept) == 2
    pair.assert_same_weights(atol=1e-5)
    pair.close()


def test_an_alias_that_is_kept_reads_as_nan_where_that_is_asked_for(run_ranks) -> None:
    run_ranks(keep_an_alias, 2)


def leave_no_trace() -> None:
    import gc
    import weakref

    pair = Pair(3, tower())
    pair.step_both(0)
    engine = weakref.ref(pair.engine)
    pair.close()
    del pair
    gc.collect()
    assert engine() is None


def test_a_destroyed_engine_can_be_collected(run_ranks) -> None:
    run_ranks(leave_no_trace, 2)


def frozen_again() -> None:
    """A model that was sharded, frozen parts too, trains under a stage that keeps weights whole."""
    first = Pair(3, tower(frozen=True))
    first.step_both(0)
    first.close()
    second = Pair(1, first.model)
    second.step_both(1)
    second.assert_same_weights(atol=1e-5)
    second.close()


def test_a_sharded_model_may_be_given_to_a_lower_stage(run_ranks) -> None:
    run_ranks(frozen_again, 2)


class Marked(torch.autograd.Function):
    """The identity; `alive` holds a weak reference to each node of a graph that is there."""

    alive: ClassVar[list[Any]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Marked.alive.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class MarkedBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Marked.apply(x))


def unused_graph() -> None:
    model = nn.Sequential(nn.Linear(6, 6), *(MarkedBlock(6) for _ in range(4)))
    pair = Pair(3, model)
    pair.step_both(0)
    Marked.alive.clear()
    gc.disable()
    try:
        pair.engine(inputs(1, pair.rank))  # a loss that is never used
        assert len(Marked.alive) == 4
        assert not any(node() is not None for node in Marked.alive), "the graph waits for the garbage collector"
    finally:
        gc.enable()
        Marked.alive.clear()
    pair.step_both(2)
    pair.assert_same_weights(atol=1e-5)  # Adam divides roundings by small gradients
    pair.close()


def test_a_graph_that_nobody_uses_goes_at_once(run_ranks) -> None:
    run_ranks(unused_graph, 2)
