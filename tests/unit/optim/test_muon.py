"""Muon against torch's own, its auxiliary AdamW, and which parameters it takes for matrices."""

import copy

import pytest
import torch

from craken.optim import Muon, build_optimizer
from craken.optim.muon import is_muon_matrix, orthogonalize

from .reference import make_grads, make_params, take_steps


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"nesterov": False, "momentum": 0.8}], ids=str)
def test_matrices_step_as_in_torchs_muon(shape, options):
    mine, theirs = make_params([shape]), make_params([shape])
    grads = make_grads(mine, 4)
    expected = take_steps(torch.optim.Muon(theirs, lr=0.02, **{"weight_decay": 0.0, **options}), theirs, grads)
    torch.testing.assert_close(take_steps(Muon(mine, lr=0.02, **options), mine, grads), expected, rtol=0, atol=2e-4)


def test_orthogonalized_singular_values_lie_around_one():
    matrix = make_params([(48, 96)])[0].detach()
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_stacked_matrices_are_updated_one_by_one():
    stacked = make_params([(3, 10, 6)])
    singles = [torch.nn.Parameter(matrix.clone()) for matrix in stacked[0].detach()]
    grads = make_grads(stacked, 3)
    got = take_steps(Muon(stacked), stacked, grads)[0]
    expected = take_steps(Muon(singles), singles, [list(step[0]) for step in grads])
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=2e-4)


def test_convolutions_are_matrices_of_their_output_channels():
    filters = make_params([(8, 3, 2, 2)])
    matrix = [torch.nn.Parameter(filters[0].detach().reshape(8, 12).clone())]
    grads = make_grads(filters, 3)
    got = take_steps(Muon(filters), filters, grads)[0]
    expected = take_steps(Muon(matrix), matrix, [[step[0].reshape(8, 12)] for step in grads])[0]
    assert torch.equal(got.reshape(8, 12), expected)


def test_the_rest_steps_as_adamw_does_before_and_after_a_state_dict():
    rest, plain = make_params([(5,), (9, 4)]), make_params([(5,), (9, 4)])
    grads = make_grads(rest, 6)
    group = {"params": rest, "use_muon": False, "lr": 0.01, "weight_decay": 0.2}
    adamw = torch.optim.AdamW(plain, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.2, fused=True)
    muon = Muon([group])
    take_steps(muon, rest, grads[:3])
    muon.load_state_dict(copy.deepcopy(muon.state_dict()))
    for mine, theirs in zip(take_steps(muon, rest, grads[3:]), take_steps(adamw, plain, grads), strict=True):
        assert torch.equal(mine, theirs)


def test_adam_w_mode_of_the_config_holds_for_the_rest():
    for decoupled, plain_class in ((True, torch.optim.AdamW), (False, torch.optim.Adam)):
        mine, theirs = make_params([(5,)]), make_params([(5,)])
        grads = make_grads(mine, 3)
        built = build_optimizer("Muon", {"lr": 0.01, "weight_decay": 0.2, "adam_w_mode": decoupled}, mine)
        plain = plain_class(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.2, fused=True)
        assert torch.equal(take_steps(built, mine, grads)[0], take_steps(plain, theirs, grads)[0])


def test_parameter_without_gradient_is_left_alone():
    params = make_params([(6, 4), (4, 6)])
    before = params[0].detach().clone()
    optimizer = Muon(params, weight_decay=0.5)
    take_steps(optimizer, params, [[None, grads[1]] for grads in make_grads(params, 2)])
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(8, 4)
        self.proj = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.lm_head = torch.nn.Linear(4, 8, bias=False)


def test_config_splits_matrices_from_the_rest_by_shape_and_name():
    model = Model()
    named = dict(model.named_parameters())
    names = {param: name for name, param in named.items()}
    for entries, given_names in ((list(named.values()), names), (list(named.items()), None)):
        built = build_optimizer("Muon", {"muon_lr": 0.03, "adam_lr": 1e-3}, entries, param_names=given_names)
        matrices, rest = built.param_groups
        assert {names[param] for param in matrices["params"]} == {"proj.weight", "conv.weight"}
        assert {names[param] for param in rest["params"]} == set(named) - {"proj.weight", "conv.weight"}
        assert (matrices["lr"], rest["lr"]) == (0.03, 1e-3)
        assert (matrices["use_muon"], rest["use_muon"]) == (True, False)


def test_config_rates_fall_back_as_in_the_original():
    def rates(params):
        return [group["lr"] for group in build_optimizer("Muon", params, Model().parameters()).param_groups]

    assert rates({}) == [0.02, 3e-4]
    assert rates({"lr": 0.1}) == [0.1, 0.1]
    assert rates({"lr": 0.1, "adam_lr": 0.2}) == [0.1, 0.2]


def test_groups_of_the_user_keep_their_rates_and_options():
    model = Model()
    first = {"params": [model.proj.weight, model.proj.bias], "lr": 0.5, "my_key": 1}
    second = {"params": [model.norm.weight], "lr": 0.7}
    groups = build_optimizer("Muon", {"lr": 0.1}, [first, second]).param_groups
    assert [(g["use_muon"], g["lr"], g.get("my_key")) for g in groups] == [
        (True, 0.5, 1),
        (False, 0.5, 1),
        (False, 0.7, None),
    ]
    assert groups[2] is second


def test_use_muon_attribute_decides():
    weight = torch.nn.Parameter(torch.ones(3, 3))
    weight.use_muon = False
    assert not is_muon_matrix(weight, "proj.weight")
    weight.use_muon = True
    assert is_muon_matrix(weight, "lm_head.weight")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"momentum": 1.0}, "betas"), ({"ns_method": "svd"}, "ns_method must be one of"), ({"lr": -1}, "lr must be")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(make_params([(2, 2)]), **options)


def test_vector_in_a_matrix_group_is_refused():
    with pytest.raises(ValueError, match=r"got a parameter of shape \(5,\).*use_muon=False"):
        Muon(make_params([(5,)]))
