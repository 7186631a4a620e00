"""Which modules bring their weights together."""

from __future__ import annotations

import torch
from torch import nn

from craken.zero.plans.units import choose_persistent, plan_units


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.Linear(1, 1).weight.detach())
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 8, bias=False)


def names(model: nn.Module, **options) -> dict[str, list[str]]:
    options.setdefault("max_numel", 10**6)
    return {unit.name: [name for name, _ in unit.params] for unit in plan_units(model, **options)}


def test_blocks_are_units_and_so_is_what_lies_around_them() -> None:
    planned = names(Model())
    assert list(planned) == ["", "embed", "layers.0", "layers.1", "layers.2", "head"]
    assert planned[""] == ["scale"]
    assert planned["layers.1"] == [f"layers.1.{part}.{what}" for part in ("up", "down") for what in ("weight", "bias")]


def test_a_tied_parameter_is_in_its_first_unit() -> None:
    model = Model()
    model.head.weight = model.embed.weight
    planned = names(model)
    assert planned["embed"] == ["embed.weight"]
    assert "head" not in planned


def test_a_block_over_the_budget_is_split_unless_it_is_a_leaf() -> None:
    model = Model()
    assert "layers.0.up" in names(model, max_numel=30)
    planned = names(model, max_numel=30, leaves=[model.layers[1]])
    assert "layers.1" in planned
    assert "layers.1.up" not in planned
    assert "layers.0.up" in planned
    assert planned["layers.0"] == []


def test_a_module_of_small_layers_is_gathered_as_one_if_asked() -> None:
    assert "layers.0.up" in names(Model(), max_numel=30, small_layer_numel=19)
    planned = names(Model(), max_numel=30, small_layer_numel=20)  # a layer has 4 x 4 + 4
    assert "layers.0.up" not in planned
    assert len(planned["layers.0"]) == 4


def test_the_smallest_parameters_stay_whole_up_to_a_total() -> None:
    params = [nn.Parameter(torch.empty(numel)) for numel in (7, 3, 5, 9)]

    def sizes(**limits: int) -> list[int]:
        chosen = choose_persistent(params, **limits)
        return [param.numel() for param in params if id(param) in chosen]

    assert sizes(max_numel=7, max_total=100) == [7, 3, 5]
    assert sizes(max_numel=7, max_total=14) == [3, 5]
    assert sizes(max_numel=0, max_total=100) == []


def test_a_class_that_the_model_names_is_a_block() -> None:
    model = nn.Module()
    model.only = Block()
    assert list(names(model)) == ["", "only", "only.up", "only.down"]
    assert names(model)["only"] == []
    model._no_split_modules = ["Block"]
    assert list(names(model)) == ["", "only"]


def test_a_block_that_cannot_run_itself_is_split_into_parts_that_can() -> None:
    model = nn.ModuleList(nn.ModuleList([Block(), nn.Linear(4, 4)]) for _ in range(2))
    assert [name for name in names(model) if name] == ["0.0", "0.1", "1.0", "1.1"]


def test_every_parameter_is_in_one_unit() -> None:
    model = Model()
    planned = [name for group in names(model, max_numel=30).values() for name in group]
    assert sorted(planned) == sorted(name for name, _ in model.named_parameters())
