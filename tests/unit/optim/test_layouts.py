"""Which optimizers may be cut, which must see whole parameters, and which are refused."""

import pytest
import torch

from craken.optim import Lamb, Layout, Lion, Muon, build_optimizer, can_step_in_chunks, param_layouts, takes_grad_scale
from craken.optim.deepspeed_names import DeepSpeedCPUAdagrad, FusedAdam

from .reference import flat_fragments, joined, make_grads, make_params, take_steps

ELEMENTWISE = ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


def layouts(optimizer):
    return [layout for group in param_layouts(optimizer) for layout in group]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_of_torch_are_packed_and_stay_right_when_cut(name):
    cls = getattr(torch.optim, name)
    whole = make_params([(7, 5), (3,)])
    grads = make_grads(whole, 3)
    shards = flat_fragments(whole, 3)
    assert layouts(cls(whole)) == [Layout.PACKED] * 2
    assert can_step_in_chunks(cls(whole))
    for rank, fragments in enumerate(shards):
        held = [fragment for fragment in fragments if fragment.numel()]
        cut = [[g for g in flat_fragments(step, 3)[rank] if g.numel()] for step in grads]
        take_steps(cls(held), held, cut)
    for mine, theirs in zip(joined(shards, whole), take_steps(cls(whole), whole, grads), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_matrix_optimizers_are_whole():
    for optimizer in (torch.optim.Adafactor(make_params()), torch.optim.Muon(make_params([(4, 4)]))):
        assert set(layouts(optimizer)) == {Layout.WHOLE}
        assert not can_step_in_chunks(optimizer)


def test_own_optimizers_have_their_layouts():
    matrices, rest = make_params([(4, 4)]), make_params([(4,)])
    muon = Muon([{"params": matrices}, {"params": rest, "use_muon": False}])
    assert param_layouts(muon) == [[Layout.WHOLE], [Layout.PACKED]]
    assert set(layouts(Lion(make_params()))) == {Layout.PACKED}
    assert set(layouts(Lamb(make_params()))) == {Layout.PACKED}
    assert [can_step_in_chunks(o) for o in (muon, Lion(make_params()), Lamb(make_params()))] == [False, True, False]


def test_layouts_line_up_with_groups_that_may_be_empty():
    params = make_params()
    optimizer = torch.optim.AdamW([{"params": []}, {"params": params[:3]}, {"params": params[3:]}])
    assert [len(group) for group in param_layouts(optimizer)] == [0, 3, 1]


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizer_that_the_step_cannot_drive_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"optimizer {name} can't be used: .*AdamW"):
        param_layouts(getattr(torch.optim, name)(make_params()))


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_subclass_that_leaves_step_alone_counts_as_its_base(wrapped_first):
    class Renamed(torch.optim.SGD):
        pass

    if wrapped_first:  # torch wraps step on the first class of a family that is constructed
        torch.optim.SGD.step.hooked = False
    try:
        assert can_step_in_chunks(Renamed(make_params(), lr=0.1))
    finally:
        torch.optim.SGD.step.hooked = True


def test_hooks_on_step_keep_it_in_one_piece():
    optimizer = build_optimizer("Adagrad", {}, make_params())
    assert can_step_in_chunks(optimizer)
    handle = optimizer.register_step_post_hook(lambda *args: None)
    assert not can_step_in_chunks(optimizer)
    handle.remove()
    assert can_step_in_chunks(optimizer)


class HandedIn(torch.optim.Optimizer):
    """A user's optimizer; `direction` makes it what each test needs."""

    def __init__(self, params, lr=0.1, power=1.0):
        super().__init__(params, {"lr": lr, "power": power})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param -= group["lr"] * self.direction(param, group["power"])

    def direction(self, param, power):
        return param.grad.sign() * param.grad.abs() ** power


class NormScaled(HandedIn):
    def direction(self, param, power):
        return param.grad / param.grad.norm()


class NeedsMatrices(HandedIn):
    def direction(self, param, power):
        if param.ndim != 2:
            raise ValueError("matrices only")
        return param.grad


class Noisy(HandedIn):
    def direction(self, param, power):
        return param.grad + torch.rand(())


class Strange(HandedIn):
    def __init__(self, params, model):
        super().__init__(params)


class NeedsClosure(HandedIn):
    def step(self, closure):
        closure()


def test_unknown_elementwise_class_is_found_to_be_packed():
    optimizer = HandedIn(make_params(), power=0.5)
    assert set(layouts(optimizer)) == {Layout.PACKED}
    assert not can_step_in_chunks(optimizer)


@pytest.mark.parametrize("cls", [NormScaled, NeedsMatrices])
def test_unknown_class_that_sees_the_cut_is_whole(cls):
    assert set(layouts(cls(make_params()))) == {Layout.WHOLE}


def test_class_that_cannot_be_tried_out_is_whole_and_says_so(caplog):
    from craken.log import logger

    logger.propagate = True
    try:
        assert set(layouts(Strange(make_params(), model=None))) == {Layout.WHOLE}
    finally:
        logger.propagate = False
    assert "optimizer Strange could not be tried out" in caplog.text


def test_class_that_needs_a_closure_is_refused_by_name():
    with pytest.raises(ValueError, match="optimizer NeedsClosure needs a closure"):
        param_layouts(NeedsClosure(make_params()))


def test_trying_out_touches_neither_tensors_nor_random_state():
    params = make_params()
    before, state = [param.detach().clone() for param in params], torch.get_rng_state()
    optimizer = Noisy(params)
    rate = torch.tensor(0.1)
    optimizer.param_groups[0]["lr"] = rate
    layouts(optimizer)
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert all(param.grad is None for param in params)
    assert optimizer.param_groups[0]["lr"] is rate
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), state)


def test_fused_optimizers_take_the_gradient_scale():
    for optimizer in (
        build_optimizer("AdamW", {}, make_params()),
        build_optimizer("SGD", {}, make_params()),
        FusedAdam(make_params()),
        DeepSpeedCPUAdagrad(make_params()),
    ):
        assert takes_grad_scale(optimizer)
        params = optimizer.param_groups[0]["params"]
        before = params[0].detach().clone()
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.found_inf = torch.ones(())
        optimizer.grad_scale = torch.ones(())
        optimizer.step()
        assert torch.equal(params[0], before)


def test_others_do_not_take_the_gradient_scale():
    for optimizer in (Lion(make_params()), Lamb(make_params()), torch.optim.AdamW(make_params())):
        assert not takes_grad_scale(optimizer)
    mixed = torch.optim.AdamW([{"params": make_params(), "fused": False}, {"params": make_params()}], fused=True)
    assert not takes_grad_scale(mixed)
