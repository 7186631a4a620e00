"""LAMB against a plain loop, and its layer norms across shards."""

import copy

import pytest
import torch

from craken.optim import Lamb

from .reference import flat_fragments, joined, make_grads, make_params, take_steps

OPTIONS = [
    {},
    {"weight_decay": 0.2, "lr": 0.05},
    {"bias_correction": False, "lr": 0.05},
    {"eps_inside_sqrt": True, "eps": 1e-3, "lr": 0.05},
    {"max_coeff": 0.5, "min_coeff": 0.4, "lr": 0.05},
    {"betas": (0.7, 0.8), "weight_decay": 0.1, "lr": 0.05},
]


def plain_lamb(params, grads_per_step, **given):
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}
    options |= {"eps_inside_sqrt": False, "max_coeff": 10.0, "min_coeff": 0.01, **given}
    beta1, beta2 = options["betas"]
    params = [param.detach().double() for param in params]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    for step, grads in enumerate(grads_per_step, start=1):
        for param, (first, second), grad in zip(params, moments, grads, strict=True):
            first.mul_(beta1).add_(grad.double(), alpha=1 - beta1)
            second.mul_(beta2).add_(grad.double().square(), alpha=1 - beta2)
            inside = options["eps"] if options["eps_inside_sqrt"] else 0.0
            outside = 0.0 if options["eps_inside_sqrt"] else options["eps"]
            update = first / ((second + inside).sqrt() + outside) + options["weight_decay"] * param
            ratio = 1.0
            if param.norm() > 0 and update.norm() > 0:
                ratio = min(max(float(param.norm() / update.norm()), options["min_coeff"]), options["max_coeff"])
            size = options["lr"]
            if options["bias_correction"]:
                size *= (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            param -= size * ratio * update
    return params


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_lamb_follows_its_formula(options):
    params = make_params()
    grads = make_grads(params, 5)
    expected = plain_lamb(params, grads, **options)
    for mine, theirs in zip(take_steps(Lamb(params, **options), params, grads), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_zero_weights_move_with_a_ratio_of_one():
    param = torch.nn.Parameter(torch.zeros(4))
    take_steps(Lamb([param], lr=0.1, bias_correction=False, betas=(0.0, 0.0), eps=0.0), [param], [[torch.ones(4)]])
    assert param.tolist() == pytest.approx([-0.1] * 4)


@pytest.mark.parametrize("num_shards", [2, 5])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_shards_with_a_sum_over_them_step_as_whole_layers_do(num_shards, options):
    whole = make_params()
    grads = make_grads(whole, 3)
    shards = flat_fragments(whole, num_shards)
    assert any(fragment.numel() == 0 for fragments in shards for fragment in fragments)
    optimizers = [Lamb([{"params": f[:2]}, {"params": f[2:]}], **options) for f in shards]
    for step in grads:
        step_shards(optimizers, shards, flat_fragments(step, num_shards))
    expected = take_steps(Lamb(whole, **options), whole, grads)
    for mine, theirs in zip(joined(shards, whole), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def step_shards(optimizers, shards, grads_of_shards):
    """Step every shard: once to hear its norms, which must leave its weights alone, and once with their sum."""
    heard = []
    for optimizer, fragments, grads in zip(optimizers, shards, grads_of_shards, strict=True):
        for fragment, grad in zip(fragments, grads, strict=True):
            fragment.grad = grad
        heard.append(norms_of(optimizer))
    assert all(norms.shape == (4, 2) and norms.dtype == torch.float64 for norms in heard)
    total = torch.stack(heard).sum(0)
    for optimizer in optimizers:
        optimizer.sum_over_shards = lambda norms: total
        optimizer.step()


class _Heard(Exception):
    """Ends a step once its norms are known."""


def norms_of(optimizer):
    """Return what a step would pass to `sum_over_shards`, and undo what the step did up to there."""
    before = {param: {key: value.clone() for key, value in state.items()} for param, state in optimizer.state.items()}
    norms = []

    def listen(squares):
        norms.append(squares)
        raise _Heard

    optimizer.sum_over_shards = listen
    with pytest.raises(_Heard):
        optimizer.step()
    optimizer.state.clear()
    optimizer.state.update(before)
    return norms[0]


def test_norms_come_in_one_tensor_in_group_order_with_zeros_without_gradient():
    params = make_params([(3,), (4,), (5,)])
    optimizer = Lamb([{"params": params[:1]}, {"params": params[1:]}])
    params[0].grad, params[2].grad = torch.ones(3), torch.ones(5)
    norms = norms_of(optimizer)
    squares = [param.detach().square().sum().item() for param in params]
    assert norms[:, 0].tolist() == pytest.approx([squares[0], 0.0, squares[2]])
    assert norms[1].tolist() == [0.0, 0.0]
    assert (norms[[0, 2], 1] > 0).all()


def test_norm_of_a_long_layer_is_exact():
    param = torch.nn.Parameter(torch.full((3_000_001,), 0.1))
    param.grad = torch.ones_like(param)
    assert norms_of(Lamb([param]))[0, 0].item() == pytest.approx(3_000_001 * 0.01, rel=1e-6)


def test_parameter_without_gradient_is_left_alone():
    params = make_params()
    before = params[0].detach().clone()
    optimizer = Lamb(params, lr=0.1, weight_decay=0.5)
    take_steps(optimizer, params, [[None, *grads[1:]] for grads in make_grads(params, 2)])
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    assert optimizer.state[params[1]]["step"].item() == 2


def test_saved_state_goes_on_exactly():
    params = make_params()
    grads = make_grads(params, 4)
    optimizer = Lamb(params, lr=0.01)
    take_steps(optimizer, params, grads[:2])
    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = Lamb(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, theirs in zip(
        take_steps(resumed, again, grads[2:]), take_steps(optimizer, params, grads[2:]), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amsgrad": True}, "no AMSGrad"),
        ({"max_grad_norm": 1.0}, "gradient_clipping"),
        ({"min_coeff": 2.0, "max_coeff": 1.0}, "min_coeff <= max_coeff"),
        ({"eps": -1e-8}, "eps must be >= 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lamb(make_params(), **options)
