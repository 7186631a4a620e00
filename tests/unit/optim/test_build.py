"""Optimizers by the names and params of a config: classes, defaults, and every refusal."""

import pytest
import torch
from torch import nn

from craken.optim import Lamb, Lion, Muon, build_optimizer, fuse_where_open

from .reference import make_grads, make_params, take_steps


def options_of(optimizer, *keys):
    return tuple(optimizer.param_groups[0][key] for key in keys)


@pytest.mark.parametrize(
    ("name", "params", "cls"),
    [
        ("Adam", {}, torch.optim.AdamW),
        ("AdamW", {}, torch.optim.AdamW),
        ("adamw", {}, torch.optim.AdamW),
        ("FusedAdam", {}, torch.optim.AdamW),
        ("DeepSpeedCPUAdam", {}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False}, torch.optim.Adam),
        ("AdamW", {"adam_w_mode": False}, torch.optim.AdamW),
        ("SGD", {"lr": 0.1}, torch.optim.SGD),
        ("Adagrad", {}, torch.optim.Adagrad),
        ("Lion", {}, Lion),
        ("FusedLion", {}, Lion),
        ("LAMB", {}, Lamb),
        ("Lamb", {}, Lamb),
        ("RMSprop", {}, torch.optim.RMSprop),
        ("NAdam", {}, torch.optim.NAdam),
        ("rmsprop", {}, torch.optim.RMSprop),
    ],
)
def test_names_of_deepspeed_and_torch_build_their_class(name, params, cls):
    built = build_optimizer(name, params, make_params())
    assert isinstance(built, cls)
    if cls is torch.optim.Adam:
        assert not isinstance(built, torch.optim.AdamW)


def test_muon_is_ours():
    assert isinstance(build_optimizer("Muon", {}, make_params()), Muon)


def test_defaults_are_the_originals():
    keys = ("lr", "betas", "eps", "weight_decay")
    assert options_of(build_optimizer("AdamW", {}, make_params()), *keys) == (1e-3, (0.9, 0.999), 1e-8, 0.0)
    assert options_of(build_optimizer("Adam", {}, make_params()), *keys) == (1e-3, (0.9, 0.999), 1e-8, 0.0)
    torch_adam = build_optimizer("AdamW", {"torch_adam": True}, make_params())
    assert options_of(torch_adam, *keys) == (1e-3, (0.9, 0.999), 1e-8, 0.01)
    plain = build_optimizer("Adam", {"torch_adam": True, "adam_w_mode": False}, make_params())
    assert options_of(plain, *keys) == (1e-3, (0.9, 0.999), 1e-8, 0)
    assert options_of(build_optimizer("Lion", {}, make_params()), "lr", "betas", "weight_decay") == (
        1e-3,
        (0.9, 0.999),
        0.0,
    )
    assert options_of(build_optimizer("Lamb", {}, make_params()), "lr", "max_coeff", "min_coeff") == (1e-3, 10.0, 0.01)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_kernels_are_fused_unless_the_config_or_a_group_says_otherwise(name):
    assert options_of(build_optimizer(name, {}, make_params()), "fused") == (True,)
    assert not options_of(build_optimizer(name, {"fused": False}, make_params()), "fused")[0]
    assert not options_of(build_optimizer(name, {"foreach": True}, make_params()), "fused")[0]
    by_group = build_optimizer(name, {}, [{"params": make_params(), "foreach": True}])
    assert not options_of(by_group, "fused")[0]


def test_dtypes_without_fused_kernels_are_built_without():
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    assert options_of(build_optimizer("AdamW", {}, params), "fused") == (None,)


def test_groups_stay_the_same_objects_with_their_own_options():
    params = make_params()
    decayed, free = {"params": params[:2], "weight_decay": 0.5, "tag": "a"}, {"params": params[2:], "lr": 0.7}
    built = build_optimizer("AdamW", {"lr": 0.1}, [decayed, free])
    assert built.param_groups[0] is decayed
    assert built.param_groups[1] is free
    assert (decayed["lr"], decayed["tag"], free["lr"], free["weight_decay"]) == (0.1, "a", 0.7, 0.0)


def test_named_parameters_keep_their_names():
    model = torch.nn.Linear(2, 2)
    built = build_optimizer("AdamW", {}, list(model.named_parameters()))
    assert built.param_groups[0]["param_names"] == ["weight", "bias"]


def test_adam_without_bias_correction_is_plain_momentum_over_rms():
    params = make_params([(6,)])
    grads = make_grads(params, 3)
    expected, first, second = params[0].detach().double(), 0.0, 0.0
    for (grad,) in grads:
        first = 0.9 * first + 0.1 * grad.double()
        second = 0.999 * second + 0.001 * grad.double().square()
        expected = expected - 0.01 * first / (second.sqrt() + 1e-8)
    built = build_optimizer("Adam", {"bias_correction": False, "lr": 0.01}, params)
    torch.testing.assert_close(take_steps(built, params, grads)[0].double(), expected, rtol=1e-6, atol=1e-7)


def test_lists_become_tuples():
    assert options_of(build_optimizer("Adam", {"betas": [0.8, 0.9]}, make_params()), "betas") == ((0.8, 0.9),)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("Nonsense", {}, "optimizer.type 'Nonsense' is no known optimizer; known: ASGD, .*Muon"),
        ("AdmaW", {}, "did you mean 'AdamW'"),
        ("AdamW", {"weight_deacy": 0.1}, r"optimizer.params.weight_deacy .*did you mean 'weight_decay'"),
        ("AdamW", {"lr": "1e-3"}, "optimizer.params.lr must be a finite number, got '1e-3'"),
        ("AdamW", {"lr": True}, "optimizer.params.lr must be a finite number, got True"),
        ("AdamW", {"lr": float("nan")}, "optimizer.params.lr must be a finite number, got nan"),
        ("AdamW", {"lr": "auto"}, "optimizer.params.lr is 'auto'"),
        ("AdamW", {"lr": -1.0}, "optimizer.params do not fit 'AdamW': .*-1"),
        ("AdamW", {"betas": 0.9}, "optimizer.params.betas must be a list of 2 numbers"),
        ("AdamW", {"betas": [0.9, "x"]}, "optimizer.params.betas must be a list of 2 numbers"),
        ("AdamW", {"amsgrad": 1}, "optimizer.params.amsgrad must be true or false, got 1"),
        ("AdamW", {"max_grad_norm": 1.0}, "'gradient_clipping'"),
        ("Lamb", {"max_grad_norm": 1.0}, "'gradient_clipping'"),
        ("SGD", {"lr": 0.1, "betas": [0.9, 0.99]}, "optimizer.params.betas is no known option"),
        ("SGD", {"nesterov": True}, "optimizer.params do not fit 'SGD'"),
        ("Lion", {"eps": 1e-8}, "optimizer.params.eps is no known option"),
        ("Muon", {"ns_method": 3}, "optimizer.params.ns_method must be a string"),
        ("LBFGS", {}, "optimizer LBFGS can't be used"),
        ("SparseAdam", {}, "optimizer SparseAdam can't be used"),
    ],
)
def test_wrong_optimizer_section_is_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(name, params, make_params())


@pytest.mark.parametrize("name", ["OneBitAdam", "ZeroOneAdam", "OneBitLamb", "MuAdam", "MuAdamW", "MuSGD"])
def test_missing_optimizers_say_what_to_use_instead(name):
    with pytest.raises(NotImplementedError, match=f"'{name}' is not part of craken: (use|build)"):
        build_optimizer(name, {}, make_params())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_choice_left_open_becomes_the_fused_kernel_and_one_made_stays(kind):
    left_open = kind([nn.Parameter(torch.ones(3))], lr=0.1)
    fuse_where_open(left_open)
    assert [group["fused"] for group in left_open.param_groups] == [True]
    made = kind([nn.Parameter(torch.ones(3))], lr=0.1, foreach=True)
    fuse_where_open(made)
    assert [group["fused"] for group in made.param_groups] != [True]
