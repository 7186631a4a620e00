"""Ways in which models reach their weights at stage 3, each trained beside the plain twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.parity.side_by_side import Pair, error, inputs

WIDTH = 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Wrapped(nn.Module):
    """Blocks around something peculiar, so that there is a unit before it and one after."""

    def __init__(self, *peculiar: nn.Module) -> None:
        super().__init__()
        self.first, self.peculiar, self.last = Block(), nn.ModuleList(peculiar), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for module in self.peculiar:
            x = module(x)
        return self.last(x)


class Table(nn.Module):
    """A unit that returns its weight: itself, or a view."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.how = nn.Parameter(torch.randn(3, WIDTH)), how

    def forward(self) -> Any:
        shown = {
            "itself": self.table,
            "slice": self.table[:2],
            "expanded": self.table[0].expand(3, WIDTH),
            "flat": self.table.view(-1),
        }[self.how]
        return {"table": (shown,)}


class MultipliesByTable(nn.Module):
    """Its own backward reads the table's memory before any gradient reaches the table's output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = Table(how)

    def forward(self, x: Tensor) -> Tensor:
        (table,) = self.inner()["table"]
        return x * table.reshape(-1, WIDTH).mean(0) + x * table.reshape(-1, WIDTH)[0]


class ReadsElsewhere(nn.Module):
    """Reads another unit's weight as attribute, detached, and through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.owner(x)
        x = F.linear(x, self.owner.up.weight)
        x = x + F.linear(x, self.owner.down.weight.detach())
        return x - F.linear(x, self.owner.down.weight.data)


class UsesTwice(nn.Module):
    """One block three times: plain, and recomputed in both ways."""

    def __init__(self, *ways: bool | None) -> None:
        super().__init__()
        self.block, self.ways = Block(), ways

    def forward(self, x: Tensor) -> Tensor:
        for use_reentrant in self.ways:
            is_plain = use_reentrant is None
            x = self.block(x) if is_plain else checkpoint(self.block, x, use_reentrant=use_reentrant)
        return x


class TiedUnits(nn.Module):
    """Two blocks that share one matrix, one that shares it with the model's first block."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Block(), Block()
        self.right.up.weight = self.left.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


class Penalty(nn.Module):
    """Adds the gradient of an inner block with respect to its input: a double backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        (slope,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return y + 0.1 * slope


class Overrides(nn.Module):
    """Runs a block with one weight replaced by a function of others."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        other = self.block.up.weight * 0.5 + self.block.down.weight
        return functional_call(self.block, {"up.weight": other}, (x,))


class CallsItself(nn.Module):
    """Runs itself inside of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(WIDTH)), Block()

    def forward(self, x: Tensor, times: int = 3) -> Tensor:
        return self.inner(x) * self.weight if times == 0 else self(x, times - 1) + self.weight


class Attends(nn.Module):
    """Torch's attention reads the weight of its child without running it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Recurs(nn.Module):
    """Torch's LSTM keeps its weights in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class Normalised(nn.Module):
    """A weight that is computed from two others whenever it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.older = nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.older(self.linear(x)) + self.linear.weight.sum()


class Adapted(nn.Module):
    """A frozen block with a trained detour, whose activations are kept on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = Block(), nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.base(x) + self.up(self.down(x.to(self.down.weight.dtype)))


@dataclasses.dataclass(frozen=True)
class Answer:
    hidden: Tensor
    kind: str = "answer"


class Cache:
    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers


class Slotted:
    __slots__ = ("keys",)

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Speaks(nn.Module):
    """A unit whose output hides its tensors."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.block, self.how = SpeakingBlock(how), how

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if self.how == "dict":
            return out["deep"]["hidden"][0]
        if self.how == "dataclass":
            return out.hidden
        if self.how == "cache":
            return out.layers[0].keys
        if self.how == "closure":
            return out()
        return self.block.kept


class SpeakingBlock(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), how

    def forward(self, x: Tensor) -> Any:
        x = self.down(self.up(x).tanh())
        if self.how == "dict":
            return {"deep": {"hidden": (x, 3, None, "text")}}
        if self.how == "dataclass":
            return Answer(x)
        if self.how == "cache":
            return Cache([Slotted(x)])
        if self.how == "closure":
            return lambda: x
        self.kept = x
        return None


PECULIAR: dict[str, Callable[[], nn.Module]] = {
    "returns its weight": lambda: MultipliesByTable("itself"),
    "returns a slice": lambda: MultipliesByTable("slice"),
    "returns an expanded row": lambda: MultipliesByTable("expanded"),
    "returns a flat view": lambda: MultipliesByTable("flat"),
    "reads another's weights": ReadsElsewhere,
    "uses a block twice": lambda: UsesTwice(None, None),
    "uses a block in every way": lambda: UsesTwice(True, None, False, True),
    "recomputes a shared block": lambda: UsesTwice(False, False),
    "ties weights of two units": TiedUnits,
    "differentiates inside": Penalty,
    "overrides a weight": Overrides,
    "calls itself": CallsItself,
    "attends": Attends,
    "is recurrent": Recurs,
    "normalises weights": Normalised,
    "trains an adapter": Adapted,
    "returns a dict": lambda: Speaks("dict"),
    "returns a dataclass": lambda: Speaks("dataclass"),
    "returns a cache": lambda: Speaks("cache"),
    "returns a closure": lambda: Speaks("closure"),
    "returns nothing": lambda: Speaks("nothing"),
}


def build(name: str) -> Wrapped:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Wrapped(PECULIAR[name]())


def train(name: str) -> None:
    pair = Pair(3, build(name))
    for step in range(3):
        pair.step_both(step)
        assert all(param.shape == (0,) for param in pair.model.parameters())
    if name != "differentiates inside":
        with torch.no_grad():
            torch.testing.assert_close(pair.engine(inputs(9, 0)), pair.twin(inputs(9, 0)), rtol=1e-5, atol=1e-5)
        assert all(param.shape == (0,) for param in pair.model.parameters())
    pair.assert_same_weights(atol=1e-5)  # Adam divides roundings by small gradients
    pair.close()


@pytest.mark.parametrize("name", PECULIAR)
def test_a_model_trains_that(run_ranks, name) -> None:
    run_ranks(train, 2, name)


class ShowsWeights(nn.Module):
    """Returns its weights to the user, beside what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.table = Block(), Table("slice")

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"hidden": self.block(x), "shown": Answer(self.block.up.weight), "table": self.table()["table"][0]}


def penalised(outputs: dict[str, Any]) -> Tensor:
    return error(outputs["hidden"]) + outputs["shown"].hidden.pow(2).sum() + outputs["table"].pow(3).sum()


def show_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(12)
        pair = Pair(3, ShowsWeights())
    kept = []
    for step in range(3):
        outputs = pair.engine(inputs(step, pair.rank))
        pair.engine.backward(penalised(outputs))
        pair.engine.step()
        kept.append((outputs, dict(pair.model.table())))
        pair.twin_backward_of(lambda rank, step=step: penalised(pair.twin(inputs(step, rank))))
        pair.twin_step()
    for outputs, table in kept:  # long after their memory was given back
        assert torch.isfinite(outputs["shown"].hidden.sum() + outputs["table"].sum() + table["table"][0].sum())
    pair.assert_same_weights(atol=1e-5)
    pair.close()


def test_weights_that_a_model_returns_can_be_kept(run_ranks) -> None:
    run_ranks(show_weights, 2)


def penalty_outside() -> None:
    """A gradient penalty that the user computes, with another forward between it and its backward."""

    def loss_of(model: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        return slope.pow(2).mean() + error(model(x + 1))

    pair = Pair(3, build("uses a block twice"))
    for step in range(3):
        pair.engine.backward(loss_of(pair.engine, inputs(step, pair.rank)))
        pair.engine.step()
        pair.twin_backward_of(lambda rank, step=step: loss_of(pair.twin, inputs(step, rank)))
        pair.twin_step()
        assert all(param.shape == (0,) for param in pair.model.parameters())
    pair.assert_same_weights(atol=1e-4)
    pair.close()


def test_a_gradient_penalty_is_differentiated_again(run_ranks) -> None:
    run_ranks(penalty_outside, 2)


def call_itself() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(15)
        pair = Pair(3, CallsItself())
    for step in range(3):
        pair.step_both(step)
        assert all(param.shape == (0,) for param in pair.model.parameters())
    pair.assert_same_weights(atol=1e-5)
    pair.close()


def test_the_outermost_module_may_run_inside_of_itself(run_ranks) -> None:
    run_ranks(call_itself, 2)


def twice_through_one_graph() -> None:
    pair = Pair(3, build("ties weights of two units"))
    for step in range(3):
        loss = error(pair.engine(inputs(step, pair.rank)))
        pair.engine.backward(loss, retain_graph=True)
        pair.engine.backward(loss)
        pair.engine.step()
        pair.twin_backward(step, 2.0)
        pair.twin_step()
    pair.assert_same_weights(atol=1e-5)
    pair.close()


def test_a_retained_graph_gathers_its_weights_again(run_ranks) -> None:
    run_ranks(twice_through_one_graph, 2)


class Fails(Block):
    fails_in = ""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.fails_in == "forward":
            raise ArithmeticError(self.fails_in)
        if self.fails_in == "interrupt":
            raise KeyboardInterrupt
        if self.fails_in == "backward" and x.requires_grad:
            x.register_hook(self.fail)
        return x

    def fail(self, grad: Tensor) -> None:
        raise ArithmeticError(self.fails_in)


def go_through(pair: Pair, bare: bool) -> None:
    loss = error((pair.model if bare else pair.engine)(inputs(1, pair.rank)))
    loss.backward() if bare else pair.engine.backward(loss)


def fail_and_go_on(where: str, bare: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(13)
        pair = Pair(3, Wrapped(Fails()))
    pair.step_both(0)
    pair.model.peculiar[0].fails_in = where
    with pytest.raises((ArithmeticError, KeyboardInterrupt)):
        go_through(pair, bare)
    pair.model.peculiar[0].fails_in = ""
    pair.engine.discard_gradients()
    with torch.no_grad():
        pair.model(inputs(2, pair.rank))
    assert all(param.shape == (0,) for param in pair.model.parameters())
    pair.step_both(1)
    pair.step_both(2)
    pair.assert_same_weights(atol=1e-5)
    pair.close()


@pytest.mark.parametrize("bare", [False, True], ids=["engine", "bare"])
@pytest.mark.parametrize("where", ["forward", "backward", "interrupt"])
def test_training_goes_on_after_an_exception(run_ranks, where, bare) -> None:
    run_ranks(fail_and_go_on, 2, where, bare)


def flip_trainability() -> None:
    """Weights frozen for some steps and thawed again, as adapters are around a reference pass."""
    pair = Pair(3, build("uses a block twice"))
    for step in range(6):
        for model in (pair.model, pair.twin):
            model.peculiar[0].block.up.weight.requires_grad_(step % 3 != 1)
            model.last.requires_grad_(step % 3 != 2)
        with torch.no_grad():
            pair.engine(inputs(step, pair.rank))
        pair.step_both(step)
        assert all(param.shape == (0,) for param in pair.model.parameters())
    pair.assert_same_weights(atol=1e-5)
    pair.close()


def test_trainability_may_change_between_steps(run_ranks) -> None:
    run_ranks(flip_trainability, 2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(9, WIDTH), nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table.weight.mean(0)
        for block in self.blocks:
            x = block(x)
        return x


class Translator(nn.Module):
    """An encoder and a decoder, that share a table, each called on its own by users."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Encoder()
        self.decoder.table.weight = self.encoder.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def parts_alone() -> None:
    """Encoder once, decoder in a loop without gradients, then a loss through the bare parts, with hooks on them."""
    with torch.random.fork_rng():
        torch.manual_seed(14)
        pair = Pair(3, Translator())
    x = inputs(0, 0)
    with torch.no_grad():
        torch.testing.assert_close(pair.model.encoder(x), pair.twin.encoder(x))
    called: list[str] = []
    pair.model.encoder.blocks[1].register_forward_hook(lambda *_: called.append("forward"))
    pair.model.encoder.blocks[1].register_full_backward_hook(lambda *_: called.append("backward"))
    for step in range(4):
        with torch.no_grad():
            memory = pair.model.encoder(inputs(step, pair.rank))
            for _ in range(step):
                memory = pair.model.decoder.blocks[step % 3](pair.model.decoder(memory))
        assert all(param.shape == (0,) for param in pair.model.parameters())
        pair.step_both(step)
        pair.engine.backward(error(pair.model.encoder(inputs(step, pair.rank))))
        pair.engine.step()
        pair.twin_backward_of(lambda rank, step=step: error(pair.twin.encoder(inputs(step, rank))))
        pair.twin_step()
        hidden = pair.model.encoder(inputs(step, pair.rank))
        pair.engine.backward(error(pair.model.decoder(hidden)))
        pair.engine.step()
        pair.twin_backward(step)
        pair.twin_step()
        assert all(param.shape == (0,) for param in pair.model.parameters())
    assert called.count("backward") == 12
    pair.assert_same_weights(atol=1e-4)
    pair.close()


def test_parts_of_a_model_may_be_called_alone(run_ranks) -> None:
    run_ranks(parts_alone, 2)
