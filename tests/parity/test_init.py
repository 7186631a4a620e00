"""Models that are built as shards: the same numbers as when they are built whole."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.side_by_side import Pair, error, inputs, value

STAGE3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gain = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.down(self.up(x).relu())


class Tied(nn.Module):
    """Blocks between an embedding and a head that is tied to it; buffers; a submodule of a class made here."""

    def __init__(self) -> None:
        super().__init__()

        class Norm(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(6))

            def forward(self, x: Tensor) -> Tensor:
                return F.rms_norm(x, (6,), self.scale)

        self.embed = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(3))
        self.norm, self.head = Norm(), nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(0, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + self.shift))


def seeded(build: Any, seed: int = 11) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def parts_of_all_ranks(param: nn.Parameter) -> Tensor:
    """Return what all ranks say they keep of a parameter, end to end."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, param.ds_tensor)
    return torch.cat(parts)


def built_as_shards(stage: int) -> None:
    from craken.zero import Init

    plain = seeded(Tied)
    with Init(config_dict_or_path=STAGE3):
        model = seeded(Tied, 11 + 5 * dist.get_rank())  # only rank 0 has the plain model's seed
    assert model.head.weight is model.embed.weight
    for (name, param), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (tuple(param.shape), param.ds_shape, param.ds_numel) == ((0,), whole.shape, whole.numel()), name
        assert param.requires_grad
        assert torch.equal(value(param), whole), name
        assert torch.equal(parts_of_all_ranks(param), whole.detach().flatten()), name
    pair = Pair(stage, model)
    pair.twin.load_state_dict(plain.state_dict())
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights()
    if stage == 3:
        assert all(torch.equal(parts_of_all_ranks(param), value(param).flatten()) for param in model.parameters())
    pair.close()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_model_built_as_shards_trains_as_one_built_whole(run_ranks, stage) -> None:
    run_ranks(built_as_shards, 2, stage)


def dtypes() -> None:
    from craken.zero import GatheredParameters, Init
    from craken.zero.building.construct import DeepSpeedTensorOverride as TensorOverride

    with Init(config_dict_or_path={**STAGE3, "bf16": {"enabled": True}}):
        model = seeded(Tied)
        counted = nn.Embedding(3, 2)
        counted.register_parameter("order", nn.Parameter(torch.arange(3), requires_grad=False))
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert model.shift.dtype is torch.float32
    whole = seeded(Tied)
    for param, plain in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(value(param), plain.detach().bfloat16())
    with Init(dtype=torch.float16):
        half = nn.Linear(2, 2)
    with Init():
        double = nn.Linear(2, 2, dtype=torch.float64)
    with Init(config_dict_or_path={**STAGE3, "bf16": {"enabled": True}}, tensor_overrides=[TensorOverride.device]):
        assert nn.Linear(2, 2).weight.dtype is torch.float32
    assert (half.weight.dtype, double.weight.dtype) == (torch.float16, torch.float64)
    with GatheredParameters([half.weight, double.weight]):
        assert half.weight.shape == double.weight.shape == (2, 2)


def test_parameters_are_cast_as_the_config_says_and_buffers_are_not(run_ranks) -> None:
    run_ranks(dtypes, 2)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        raise KeyError("no")


def build_failing() -> None:
    from craken.zero import Init

    with Init():
        Failing()


def contexts() -> None:
    from craken.zero import Init
    from craken.zero.building import construct

    replaced = [(nn.Linear, "__init__"), (nn.Module, "apply"), (nn.Module, "__init_subclass__")]
    replaced += [(nn.Parameter, "__deepcopy__")]
    before = [owner.__dict__.get(name) for owner, name in replaced]
    with Init():
        with Init():
            assert nn.Linear(2, 2).weight.shape == (0,)
        assert nn.Linear(2, 2).weight.shape == (0,)
        with Init(enabled=False), Init(config_dict_or_path={"zero_optimization": {"stage": 2}}):
            assert nn.Linear(2, 2).weight.shape == (0,)
        with construct.paused():
            assert nn.Linear(2, 2).weight.shape == (2, 2)
            assert copy.deepcopy(nn.Linear(2, 2)).weight.shape == (2, 2)
    for off in (Init(enabled=False), Init(config={"zero_optimization": {"stage": 2}})):
        with off:
            assert nn.Linear(2, 2).weight.shape == (2, 2)
    with pytest.raises(KeyError, match="no"):
        build_failing()
    assert before == [owner.__dict__.get(name) for owner, name in replaced]
    assert nn.Linear(2, 2).weight.shape == (2, 2)


def test_contexts_nest_and_put_everything_back(run_ranks) -> None:
    run_ranks(contexts, 2)


def world_on_demand() -> None:
    from craken.comm import is_initialized
    from craken.zero import Init

    assert not is_initialized()
    with Init():
        assert is_initialized()
        assert nn.Linear(2, 2).weight.shape == (0,)


def test_the_process_group_comes_up_when_it_is_needed(run_ranks) -> None:
    run_ranks(world_on_demand, 2, joins_world=False)


def applied() -> None:
    from craken.zero import Init

    def fill(module: nn.Module) -> None:
        for param in module.parameters(recurse=False):
            assert param.numel() == param.ds_numel
            param.data.fill_(dist.get_rank() + 1)

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(4)
            assert self.apply(lambda module: None) is self
            self.block.apply(fill)

    with Init():
        model = Filled()
        model.block.up.apply(lambda module: module.weight.data.mul_(3))
    assert value(model.block.gain).unique().tolist() == [1.0]
    assert value(model.block.up.weight).unique().tolist() == [3.0]


def test_apply_sees_whole_parameters_and_rank_zero_s_results_stay(run_ranks) -> None:
    run_ranks(applied, 2)


def conversions() -> None:
    from craken.zero import GatheredParameters, Init

    model = seeded(Tied, 11 + dist.get_rank())
    params = list(model.parameters())
    Init(module=model, config_dict_or_path=STAGE3)
    assert [param.shape for param in params] == [(0,)] * len(params)
    assert all(now is before for now, before in zip(model.parameters(), params, strict=True))
    assert torch.equal(value(model.embed.weight), seeded(Tied).embed.weight)

    with torch.device("meta"):
        layer, block = nn.Linear(64, 64), Block(4)
    weight = layer.weight
    weight.tag = "kept"
    for module in (layer, block):
        Init(module=module)
    assert layer.weight is weight
    assert weight.tag == "kept"
    assert 0.01 < value(weight).std() < 0.2, "reset_parameters() was not called"
    assert value(block.gain).tolist() == [0.0] * 4  # Block has no reset_parameters: zeros until loaded
    with torch.device("meta"), Init():
        inside = nn.Linear(64, 64)
    assert 0.01 < value(inside.weight).std() < 0.2
    with GatheredParameters(inside.parameters()):
        assert inside(torch.ones(1, 64)).shape == (1, 64)


def test_modules_that_exist_are_converted_from_the_meta_device_too(run_ranks) -> None:
    run_ranks(conversions, 2)


class Normed(nn.Module):
    """What audio models do: a convolution whose weight is parametrized in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        from craken.zero import GatheredParameters, register_external_parameter

        self.conv = nn.Conv1d(6, 5, 1)
        with GatheredParameters(self.conv.weight, modifier_rank=0):
            self.conv = nn.utils.parametrizations.weight_norm(self.conv, name="weight", dim=2)
        register_external_parameter(self, self.conv.parametrizations.weight.original0)
        register_external_parameter(self, self.conv.parametrizations.weight.original1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.unsqueeze(-1)).squeeze(-1)


def parametrized() -> None:
    from craken.zero import Init

    with Init():
        model = seeded(Normed)
    assert all(param.shape == (0,) for param in model.parameters())
    pair = Pair(3, model)
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights()
    pair.close()


def test_a_parametrized_weight_is_sharded_as_what_it_is_made_of(run_ranks) -> None:
    run_ranks(parametrized, 2)


def copied_layers() -> None:
    from craken.zero import Init

    def build() -> nn.Module:
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), 2)

    plain = seeded(build)
    with Init():
        model = seeded(build)
    assert all(param.shape == (0,) for param in model.parameters())
    assert model.layers[0].linear1.weight is not model.layers[1].linear1.weight
    for (name, param), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(value(param), whole), name
    pair = Pair(3, model)
    pair.step_both(0)
    pair.assert_same_weights(atol=1e-5)
    pair.close()


def test_layers_that_are_copies_of_one_are_shards_too(run_ranks) -> None:
    run_ranks(copied_layers, 2)


def initialize_inside() -> None:
    """An engine may be made while a context is open, of a model that is half built as shards."""
    import craken
    from craken.zero import Init

    plain = seeded(lambda: Block(6))
    with Init():
        model = seeded(lambda: Block(6))
        pair = Pair(3, nn.Sequential(model, plain))
        assert nn.Linear(2, 2).weight.shape == (0,)
    pair.step_both(0)
    pair.assert_same_weights()
    pair.close()
    craken.initialize(model=nn.Linear(2, 2), config={"train_batch_size": 2})[0].destroy()


def test_initialize_may_be_called_inside(run_ranks) -> None:
    run_ranks(initialize_inside, 2)


def optimizer_over_placeholders() -> None:
    from craken.zero import Init

    with Init():
        model = seeded(lambda: Block(6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    pair = Pair(3, model, optimizer=optimizer)
    for step in range(2):
        pair.engine.backward(error(pair.engine(inputs(step, pair.rank))))
        pair.engine.step()
        pair.twin_backward(step)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


def test_an_optimizer_may_be_made_from_placeholders(run_ranks) -> None:
    run_ranks(optimizer_over_placeholders, 2)


def muon_weights(model: nn.Module) -> list[Tensor]:
    import craken

    engine, *_ = craken.initialize(
        model=model,
        config={
            **STAGE3,
            "train_micro_batch_size_per_gpu": 3,
            "steps_per_print": 10**9,
            "optimizer": {"type": "Muon", "params": {"muon_lr": 0.02, "adam_lr": 1e-3}},
        },
    )
    for step in range(2):
        engine.backward(error(engine(inputs(step, dist.get_rank()))))
        engine.step()
    weights = [value(param).clone() for param in model.parameters()]
    engine.destroy()
    return weights


def muon_over_placeholders() -> None:
    from craken.zero import Init

    with Init():
        model = seeded(lambda: Block(6))
    plain = seeded(lambda: Block(6))
    before = [param.detach().clone() for param in plain.parameters()]
    found, expected = muon_weights(model), muon_weights(plain)
    for mine, other, old in zip(found, expected, before, strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, old)


def test_muon_knows_the_matrices_among_placeholders(run_ranks) -> None:
    run_ranks(muon_over_placeholders, 2)


class Reaching(nn.Module):
    """A constructor that writes into what it has built, in the ways people do."""

    def __init__(self, width: int = 4, layers: int = 3) -> None:
        super().__init__()
        from craken.zero import GatheredParameters

        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                module.bias.data.zero_()
        self.layers[1].weight.data.copy_(self.layers[0].weight.data * 2)
        with GatheredParameters(self.layers[2].weight, modifier_rank=1):
            self.layers[2].weight.data.fill_(dist.get_rank())
        with GatheredParameters(self.layers[2].bias):
            self.layers[2].bias.data.fill_(5.0)


def reached() -> None:
    from craken.zero import Init

    plain = seeded(Reaching)
    with Init():
        model = seeded(Reaching, 11 + dist.get_rank())
    assert all(param.shape == (0,) for param in model.parameters())
    assert all(layer.weight.shape == (0,) for layer in model.layers), "lent, though its constructor has returned"
    for name, param in model.named_parameters():
        if name != "layers.2.bias" and name != "layers.2.weight":
            assert torch.equal(value(param), plain.get_parameter(name)), name
    assert value(model.layers[2].weight).unique().tolist() == [1.0], "the block's modifier is rank 1"
    assert value(model.layers[2].bias).unique().tolist() == [0.0], "the block has no modifier"
    with pytest.raises(KeyError), Init():
        FailingLate()
    assert nn.Linear(2, 2).weight.shape == (2, 2)


class FailingLate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.weight.data.zero_()
        raise KeyError("no")


def test_a_constructor_may_write_into_what_it_has_built(run_ranks) -> None:
    run_ranks(reached, 2)


def reach_into_many() -> list[int]:
    from craken.zero import Init

    seen: list[int] = []

    class Watched(Reaching):
        def __init__(self) -> None:
            super().__init__(width=1024, layers=24)
            for layer in self.layers:
                layer.weight.data.zero_()
                seen.append(sum(param.numel() for param in self.parameters()))

    with Init():
        model = Watched()
    return [max(seen), sum(param.ds_numel for param in model.parameters())]


def test_reaching_into_everything_does_not_bring_it_together(run_ranks) -> None:
    for most, total in run_ranks(reach_into_many, 2):
        assert most < 10e6 < total / 2


def run_page(text: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    names["engine"].destroy()


def test_the_page_on_large_models_does_what_it_says(run_ranks) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "large_models.md"
    run_ranks(run_page, 2, page.read_text())
