"""Lion against a plain loop written from the paper."""

import copy

import pytest
import torch

from craken.optim import Lion

from .reference import flat_fragments, joined, make_grads, make_params, take_steps


def plain_lion(params, grads_per_step, lr, betas, weight_decay):
    params = [param.detach().double() for param in params]
    momenta = [torch.zeros_like(param) for param in params]
    for grads in grads_per_step:
        for param, momentum, grad in zip(params, momenta, grads, strict=True):
            direction = torch.sign(betas[0] * momentum + (1 - betas[0]) * grad.double())
            param -= lr * (direction + weight_decay * param)
            momentum.mul_(betas[1]).add_(grad.double(), alpha=1 - betas[1])
    return params


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_follows_the_paper(weight_decay):
    params = make_params()
    grads = make_grads(params, 6)
    expected = plain_lion(params, grads, 0.01, (0.9, 0.99), weight_decay)
    optimizer = Lion(params, lr=0.01, betas=(0.9, 0.99), weight_decay=weight_decay)
    for mine, theirs in zip(take_steps(optimizer, params, grads), expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_fragments_that_view_flat_buffers_step_as_whole_parameters_do():
    whole = make_params()
    grads = make_grads(whole, 3)
    shards = flat_fragments(whole, 3)
    for rank, fragments in enumerate(shards):
        cut = [flat_fragments(step, 3)[rank] for step in grads]
        take_steps(Lion(fragments, lr=0.01, weight_decay=0.1), fragments, cut)
    expected = take_steps(Lion(whole, lr=0.01, weight_decay=0.1), whole, grads)
    for mine, theirs in zip(joined(shards, whole), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_parameter_without_gradient_is_left_alone():
    params = make_params()
    before = params[0].detach().clone()
    optimizer = Lion(params, lr=0.01, weight_decay=0.5)
    take_steps(optimizer, params, [[None, *grads[1:]] for grads in make_grads(params, 2)])
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    assert params[1] in optimizer.state


def test_transposed_parameters_are_written_through():
    mine = [torch.nn.Parameter(make_params([(300, 400)])[0].detach().t())]
    straight = [torch.nn.Parameter(mine[0].detach().contiguous())]
    grads = make_grads(straight, 2)
    assert torch.equal(
        take_steps(Lion(mine, lr=0.1), mine, grads)[0], take_steps(Lion(straight, lr=0.1), straight, grads)[0]
    )


def test_saved_state_goes_on_exactly():
    params = make_params()
    grads = make_grads(params, 4)
    optimizer = Lion(params, lr=0.01)
    take_steps(optimizer, params, grads[:2])
    again = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = Lion(again, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, theirs in zip(
        take_steps(resumed, again, grads[2:]), take_steps(optimizer, params, grads[2:]), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
def test_impossible_rates_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Lion(make_params(), **options)
