"""Weights and gradients travel while the model computes: seen from inside of the computation, not by the clock.

A block that runs waits, by looking at memory alone, until what the next one needs has come from the other rank. Nothing
but the exchange under way can bring it: were it begun, or completed, only when it is asked for, this would never end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs

WIDTH, NUM_BLOCKS, PATIENCE_S = 6, 4, 60.0


class Block(nn.Module):
    """A residual block that calls `in_forward` and `in_backward` in the middle of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.in_forward = self.in_backward = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).tanh()
        self.in_forward()
        if hidden.requires_grad:
            hidden.register_hook(self._in_backward)
        return x + self.down(hidden)

    def _in_backward(self, grad: Tensor) -> None:
        self.in_backward()


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Seen:
    """What blocks saw of their neighbours' weights while they ran."""

    def __init__(self, pair: Pair) -> None:
        self._places = {
            id(param): (group, slot) for group in pair.engine.groups for slot, param in enumerate(group.params)
        }
        self._pair = pair
        self.arrived: list[tuple[str, int]] = []

    def await_weights(self, where: str, index: int) -> None:
        """Return once the weights of block `index` are here, though nobody has asked for them."""
        pairs = zip(
            self._pair.model.blocks[index].parameters(), self._pair.twin.blocks[index].parameters(), strict=True
        )
        for param, plain in pairs:
            group, slot = self._places[id(param)]
            assert param.shape == (0,), f"{where}: block {index} is in use already"
            assert group.weights.num_bytes > 0, f"{where}: no gather of block {index} is under way"
            expected, deadline = plain.detach(), time.monotonic() + PATIENCE_S
            while not torch.allclose(group.view_of(slot), expected, rtol=2e-6, atol=1e-5):
                assert time.monotonic() < deadline, f"{where}: the weights of block {index} do not come by themselves"
                time.sleep(0.001)
        self.arrived.append((where, index))


@contextlib.contextmanager
def no_memory_remembers() -> Iterator[None]:
    """Have memory that is taken again hold nothing of what lay there before."""
    from craken.zero.memory.room import room_for

    kind: Any = type(room_for(64, torch.float32, torch.device("cpu")))
    take = kind.take

    def take_emptied(room: Any) -> None:
        take(room)
        room.flat.fill_(float("nan"))

    with mock.patch.object(kind, "take", take_emptied):
        yield


def gathers_beside_the_computation(prefetch_numel: int) -> list[tuple[str, int]]:
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": prefetch_numel,
        "reduce_bucket_size": 2 * WIDTH * (WIDTH + 1),  # a block
    }
    with torch.random.fork_rng():
        torch.manual_seed(4)
        pair = Pair(3, Chain(), config={"zero_optimization": zero})
    pair.step_both(0)
    pair.step_both(1)  # in the order that is known by now
    seen = Seen(pair)
    for index, block in enumerate(pair.model.blocks):
        if index + 1 < NUM_BLOCKS:
            block.in_forward = lambda index=index: seen.await_weights("forward", index + 1)
        if index > 0:
            block.in_backward = lambda index=index: seen.await_weights("backward", index - 1)
    try:
        with no_memory_remembers():
            pair.engine.backward(error(pair.engine(inputs(2, pair.rank))))
            pair.engine.step()
    except AssertionError as refused:
        if "no gather" not in str(refused):
            raise
    finally:
        for block in pair.model.blocks:
            block.in_forward = block.in_backward = lambda: None
    pair.close()
    return seen.arrived


def test_the_next_weights_come_while_a_block_computes(run_ranks) -> None:
    ahead = [("forward", index) for index in (1, 2, 3)] + [("backward", index) for index in (2, 1, 0)]
    assert run_ranks(gathers_beside_the_computation, 2, 10**6) == [ahead] * 2


def test_nothing_comes_ahead_where_that_is_forbidden(run_ranks) -> None:
    assert run_ranks(gathers_beside_the_computation, 2, 0) == [[]] * 2


def reduces_beside_the_computation() -> list[int]:
    """Return the groups under way while the last block of the backward, the model's first, still computes."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2 * WIDTH * (WIDTH + 1)}
        pair = Pair(3, Chain(), config={"zero_optimization": zero})
    pair.step_both(0)
    under_way: list[int] = []

    def look() -> None:
        under_way.extend(index for index, group in enumerate(pair.engine.groups) if group.gradients.is_reducing)

    pair.model.blocks[0].in_backward = look
    pair.step_both(1)
    pair.assert_same_weights()
    pair.close()
    return under_way


def test_gradients_leave_while_earlier_blocks_are_in_backward(run_ranks) -> None:
    of_rank_0, of_rank_1 = run_ranks(reduces_beside_the_computation, 2)
    assert of_rank_0 == of_rank_1
    assert of_rank_0
    assert 0 not in of_rank_0, "the block's own gradients are not there yet"
