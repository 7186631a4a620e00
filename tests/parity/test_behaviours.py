"""What users do to an engine beside the plain loop, under each stage, against plain PyTorch's numbers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.side_by_side import DECAY, LEARNING_RATE, Pair, error, inputs, two_paths, value

STAGES = [0, 1, 2, 3]

stages = pytest.mark.parametrize("stage", STAGES)


# ---- kinds of parameters ----


def frozen(stage: int) -> None:
    model = two_paths()
    model.left.weight.requires_grad_(False)
    before = model.left.weight.detach().clone()
    pair = Pair(stage, model, model_parameters=model.parameters())
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights()
    assert torch.equal(value(model.left.weight), before)
    assert model.left.weight.grad is None
    pair.close()


@stages
def test_a_frozen_parameter_stays_and_the_others_learn(run_ranks, stage) -> None:
    run_ranks(frozen, 2, stage)


def unused(stage: int) -> None:
    model = two_paths()
    before = model.right.weight.detach().clone()
    pair = Pair(stage, model, model_parameters=model.parameters())
    for step in range(3):
        pair.step_both(step, right=False)
    pair.assert_same_weights()
    assert torch.equal(value(model.right.weight), before), "an unused parameter decayed"
    pair.close()


@stages
def test_a_parameter_that_nothing_uses_does_not_decay(run_ranks, stage) -> None:
    run_ranks(unused, 2, stage)


class Tied(nn.Module):
    """An embedding whose table is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 5), nn.Linear(5, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x.abs().long() % 6))


def tied(stage: int) -> None:
    model = Tied()
    with torch.no_grad():
        model.table.weight.copy_(torch.linspace(-1, 1, 30).view(6, 5))
    weight = model.head.weight
    pair = Pair(stage, model, model_parameters=model.parameters())
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights()
    assert model.head.weight is model.table.weight is weight
    pair.close()


@stages
def test_a_tied_parameter_is_stepped_once_with_both_gradients(run_ranks, stage) -> None:
    run_ranks(tied, 2, stage)


def twice_in_groups(stage: int) -> None:
    model = two_paths()
    groups = [{"params": list(model.parameters())}, {"params": [model.left.bias]}]
    with pytest.raises(ValueError, match=r"left\.bias|more than one|several|twice"):
        Pair(stage, model, model_parameters=groups)


@stages
def test_a_parameter_in_two_groups_is_refused(run_ranks, stage) -> None:
    run_ranks(twice_in_groups, 2, stage)


def empty_group(stage: int) -> None:
    model = two_paths()
    optimizer = torch.optim.AdamW([{"params": []}], lr=LEARNING_RATE, weight_decay=DECAY, fused=True)
    optimizer.add_param_group({"params": list(model.parameters())})
    raw_groups = optimizer.param_groups
    pair = Pair(stage, model, optimizer=optimizer)
    for step in range(3):
        pair.step_both(step)
    pair.assert_same_weights()
    assert len(pair.optimizer.param_groups) == 2
    assert all(ours is raw for ours, raw in zip(pair.optimizer.param_groups, raw_groups, strict=True))
    pair.close()


@stages
def test_an_empty_group_is_kept_and_group_dicts_are_the_users_own(run_ranks, stage) -> None:
    run_ranks(empty_group, 2, stage)


def rates_by_group(stage: int) -> None:
    model = two_paths()
    rates = [
        {"params": list(model.left.parameters()), "lr": 5e-2},
        {"params": list(model.right.parameters()), "weight_decay": 0.0},
    ]
    pair = Pair(stage, model, model_parameters=rates)
    pair.twin_optimizer = torch.optim.AdamW(
        [
            {"params": list(pair.twin.left.parameters()), "lr": 5e-2},
            {"params": list(pair.twin.right.parameters()), "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        weight_decay=DECAY,
        fused=True,
    )
    for step in range(3):
        pair.step_both(step)
    pair.optimizer.param_groups[0]["lr"] = pair.twin_optimizer.param_groups[0]["lr"] = 1e-3
    pair.step_both(3)
    pair.assert_same_weights()
    pair.close()


@stages
def test_groups_keep_rates_and_decay_of_their_own(run_ranks, stage) -> None:
    run_ranks(rates_by_group, 2, stage)


# ---- more engines than one ----


def dropped(stage: int) -> None:
    pair = Pair(stage)
    pair.step_both(0)
    model, engine = pair.model, weakref.ref(pair.engine)
    states = [weakref.ref(of_param["exp_avg"]) for of_param in pair.engine.optimizer.state.values()]
    gradients = weakref.ref(pair.engine.groups[0].gradients)
    del pair
    gc.collect()
    assert engine() is None, "the hooks of its parameters keep an engine alive"
    assert not any(state() is not None for state in states)
    if stage < 3:  # the weights are whole, and nothing of ours is needed
        assert gradients() is None
    error(model(inputs(0, 0))).backward()
    assert all(param.grad is not None for param in model.parameters())


@stages
def test_an_engine_that_is_dropped_lets_go_of_its_states_and_gradients_are_the_users(run_ranks, stage) -> None:
    run_ranks(dropped, 2, stage)


def dropped_in_backward(stage: int) -> None:
    pair = Pair(stage)
    pair.step_both(0)
    held, engine = [pair.engine], weakref.ref(pair.engine)
    output = pair.engine(inputs(1, pair.rank))
    del pair

    def let_go(grad: Tensor) -> None:
        held.clear()
        gc.collect()

    output.register_hook(let_go)
    error(output).backward()  # its sums are under way when the engine goes
    del output
    gc.collect()
    assert engine() is None


@stages
def test_an_engine_that_is_dropped_in_mid_backward_stays_to_its_end(run_ranks, stage) -> None:
    run_ranks(dropped_in_backward, 2, stage)


def two_engines(stage: int) -> None:
    first, second = Pair(stage), Pair(stage, accumulation=2)
    first_loss = error(first.engine(inputs(0, first.rank)))
    for micro in range(2):
        second.engine.backward(error(second.engine(inputs(5 + micro, second.rank))))
        if micro == 0:
            second.engine.step()
    first.engine.backward(first_loss)
    first.engine.step()
    second.engine.step()
    first.twin_backward(0)
    for micro in range(2):
        second.twin_backward(5 + micro, factor=0.5)
    for pair in (first, second):
        pair.twin_step()
        pair.assert_same_weights()
        pair.close()


@stages
def test_two_engines_in_one_process_do_not_disturb_each_other(run_ranks, stage) -> None:
    run_ranks(two_engines, 2, stage)


# ---- ways to call backward ----


def retained_graph(stage: int) -> None:
    pair = Pair(stage)
    for step in range(2):
        loss = error(pair.engine(inputs(step, pair.rank)))
        pair.engine.backward(loss, retain_graph=True)
        pair.engine.backward(loss)
        pair.engine.step()
        pair.twin_backward(step, factor=2.0)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@stages
def test_a_retained_graph_counts_twice(run_ranks, stage) -> None:
    run_ranks(retained_graph, 2, stage)


def several_losses(stage: int) -> None:
    pair = Pair(stage)
    for step in range(2):
        # two forwards first, then their backwards in the other order
        early, late = (error(pair.engine(inputs(10 * step + i, pair.rank))) for i in range(2))
        pair.engine.backward(late)
        pair.engine.backward(early)
        pair.engine.step()
        for i in range(2):
            pair.twin_backward(10 * step + i)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@stages
def test_several_losses_before_a_step_add_up(run_ranks, stage) -> None:
    run_ranks(several_losses, 2, stage)


def bare_backward(stage: int, accumulation: int) -> None:
    pair = Pair(stage, accumulation=accumulation)
    for step in range(2):
        for micro in range(accumulation):
            error(pair.engine(inputs(10 * step + micro, pair.rank))).backward()
            pair.engine.step()
            pair.twin_backward(10 * step + micro, factor=1 / accumulation)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("accumulation", [1, 3])
@stages
def test_a_bare_backward_is_averaged_over_the_micro_batches(run_ranks, stage, accumulation) -> None:
    run_ranks(bare_backward, 2, stage, accumulation)


def without_sync(stage: int) -> None:
    pair = Pair(stage)
    for step in range(2):
        with pair.engine.no_sync():
            pair.engine.backward(error(pair.engine(inputs(10 * step, pair.rank))))
        pair.engine.backward(error(pair.engine(inputs(10 * step + 1, pair.rank))))
        pair.engine.step()
        for micro in range(2):
            pair.twin_backward(10 * step + micro)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("stage", [0, 1])
def test_no_sync_keeps_gradients_at_home_until_the_next_backward(run_ranks, stage) -> None:
    run_ranks(without_sync, 2, stage)


def boundary_by_hand(stage: int) -> None:
    pair = Pair(stage, accumulation=4)
    moved = []
    for step in range(2):
        for micro in range(3):  # not the configured 4: only the flag counts
            before = value(pair.model.left.weight)
            pair.engine.set_gradient_accumulation_boundary(is_boundary=micro == 2)
            pair.engine.backward(error(pair.engine(inputs(10 * step + micro, pair.rank))))
            if micro == 2:
                pair.engine.step()
            pair.twin_backward(10 * step + micro, factor=1 / 4)
            moved.append(not torch.equal(before, value(pair.model.left.weight)))
        pair.twin_step()
    pair.assert_same_weights()
    assert moved == [False, False, True] * 2
    pair.close()


@stages
def test_a_boundary_set_by_hand_is_the_only_one(run_ranks, stage) -> None:
    run_ranks(boundary_by_hand, 2, stage)


def scaled_by_caller(stage: int) -> None:
    pair = Pair(stage, accumulation=2)
    for micro in range(2):
        pair.engine.backward(error(pair.engine(inputs(micro, pair.rank))) / 3, scale_wrt_gas=False)
        pair.engine.step()
        pair.twin_backward(micro, factor=1 / 3)
    pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@stages
def test_a_caller_may_divide_the_loss_himself(run_ranks, stage) -> None:
    run_ranks(scaled_by_caller, 2, stage)


# ---- parameters without a gradient ----


def untouched_everywhere(stage: int) -> None:
    pair = Pair(stage)
    pair.step_both(0)
    for step in (1, 2):
        before = value(pair.model.right.weight)
        pair.step_both(step, right=False)  # momentum would move it, decay would shrink it
        assert torch.equal(value(pair.model.right.weight), before)
    pair.step_both(3)  # Adam's step count must have stood still, too
    pair.assert_same_weights()
    pair.close()


@stages
def test_a_parameter_without_gradient_on_any_rank_is_skipped(run_ranks, stage) -> None:
    run_ranks(untouched_everywhere, 2, stage)


def untouched_on_one_rank(stage: int) -> None:
    # at stage 3, weights that only some ranks use must be small enough to stay whole
    pair = Pair(stage, config={"zero_optimization": {"stage": stage, "reduce_bucket_size": 20}})
    for step in range(3):
        pair.engine.backward(error(pair.engine(inputs(step, pair.rank), right=pair.rank == 0)))
        pair.engine.step()
        pair.twin_backward_of(lambda rank, step=step: error(pair.twin(inputs(step, rank), right=rank == 0)))
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@stages
def test_a_parameter_touched_on_one_rank_takes_zeros_from_the_others(run_ranks, stage) -> None:
    run_ranks(untouched_on_one_rank, 2, stage)


def touched_in_one_micro_batch(stage: int) -> None:
    pair = Pair(stage, accumulation=3)
    for step in range(2):
        for micro in range(3):
            uses = micro == 1
            pair.engine.backward(error(pair.engine(inputs(10 * step + micro, pair.rank), right=uses)))
            pair.engine.step()
            pair.twin_backward(10 * step + micro, factor=1 / 3, right=uses)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@stages
def test_a_parameter_touched_in_one_micro_batch_of_three_counts(run_ranks, stage) -> None:
    run_ranks(touched_in_one_micro_batch, 2, stage)


# ---- outputs and recomputation ----


class Checkpointed(nn.Module):
    """One layer used in three recomputed segments and once outside."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.shared, self.use_reentrant = nn.Linear(6, 6), nn.Linear(6, 6), use_reentrant

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        from torch.utils.checkpoint import checkpoint

        x = self.shared(self.first(x))
        for _ in range(3):
            x = checkpoint(lambda y: F.gelu(self.shared(y)), x, use_reentrant=self.use_reentrant)
        return {"hidden": x}


def checkpointed(stage: int, use_reentrant: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Checkpointed(use_reentrant=use_reentrant)
    pair = Pair(stage, model, accumulation=2)
    for step in range(2):
        for micro in range(2):
            pair.engine.backward(error(pair.engine(inputs(10 * step + micro, pair.rank))["hidden"]))
            pair.engine.step()
            pair.twin_backward_of(lambda rank, at=10 * step + micro: error(pair.twin(inputs(at, rank))["hidden"]), 0.5)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("use_reentrant", [False, True])
@stages
def test_a_layer_shared_by_recomputed_segments_gets_its_whole_gradient(run_ranks, stage, use_reentrant) -> None:
    run_ranks(checkpointed, 2, stage, use_reentrant)


def failed_backward(stage: int) -> None:
    pair = Pair(stage)
    loss = error(pair.engine(inputs(0, pair.rank)))
    loss.register_hook(lambda grad: (_ for _ in ()).throw(ArithmeticError("the user's own hook")))
    with pytest.raises(ArithmeticError):
        pair.engine.backward(loss)
    for step in range(2):
        pair.step_both(step)
    pair.assert_same_weights()
    pair.close()


@stages
def test_training_goes_on_after_a_backward_that_raised(run_ranks, stage) -> None:
    run_ranks(failed_backward, 2, stage)


def zero_grad_between_steps(stage: int) -> None:
    pair = Pair(stage, accumulation=2)
    for step in range(2):
        pair.engine.zero_grad()
        for micro in range(2):
            pair.engine.backward(error(pair.engine(inputs(10 * step + micro, pair.rank))))
            pair.engine.zero_grad()  # clients call it whenever they like; accumulated gradients are the engine's
            pair.engine.step()
            pair.twin_backward(10 * step + micro, factor=0.5)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@stages
def test_zero_grad_leaves_accumulated_gradients_alone(run_ranks, stage) -> None:
    run_ranks(zero_grad_between_steps, 2, stage)


def discarded(stage: int) -> None:
    pair = Pair(stage)
    pair.engine.backward(error(pair.engine(inputs(7, pair.rank))))
    pair.engine.discard_gradients()
    for step in range(2):
        pair.step_both(step)
    pair.assert_same_weights()
    pair.close()


@stages
def test_discarded_gradients_are_forgotten(run_ranks, stage) -> None:
    run_ranks(discarded, 2, stage)


def step_without_backward(stage: int) -> None:
    pair = Pair(stage)
    with pytest.raises(RuntimeError, match=r"step\(\) before backward\(\)"):
        pair.engine.step()
    pair.step_both(0)
    with pytest.raises(RuntimeError, match=r"step\(\) before backward\(\)"):
        pair.engine.step()
    pair.step_both(1)
    pair.assert_same_weights()
    pair.close()


def step_without_backward_in_mid_accumulation(stage: int) -> None:
    pair = Pair(stage, accumulation=2)
    pair.engine.backward(error(pair.engine(inputs(0, pair.rank))))
    pair.engine.step()
    with pytest.raises(RuntimeError, match=r"step\(\) before backward\(\)"):
        pair.engine.step()
    pair.engine.backward(error(pair.engine(inputs(1, pair.rank))))
    pair.engine.step()
    assert pair.engine.global_steps == 1
    for micro in range(2):
        pair.twin_backward(micro, factor=0.5)
    pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@stages
def test_each_micro_batch_wants_its_backward(run_ranks, stage) -> None:
    run_ranks(step_without_backward_in_mid_accumulation, 2, stage)


@stages
def test_a_step_before_backward_is_refused_and_harms_nothing(run_ranks, stage) -> None:
    run_ranks(step_without_backward, 2, stage)


class SharedGradients(nn.Module):
    """Two weights whose gradients are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.flat = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.square.view(-1) + self.flat) * x.sum()


def shared_gradients(stage: int, accumulation: int) -> None:
    torch.manual_seed(2)
    pair = Pair(stage, SharedGradients(), accumulation=accumulation, config={"gradient_predivide_factor": 2.0})
    for step in range(3):
        for micro in range(accumulation):
            at = accumulation * step + micro
            pair.engine.backward(error(pair.engine(inputs(at, pair.rank))))
            pair.engine.step()
            pair.twin_backward(at, factor=1 / accumulation)
        pair.twin_step()
    pair.assert_same_weights()
    pair.close()


@pytest.mark.parametrize("accumulation", [1, 2])
@stages
def test_gradients_that_share_memory_do_not_disturb_each_other(run_ranks, stage, accumulation) -> None:
    run_ranks(shared_gradients, 2, stage, accumulation)


def started_again(stage: int, is_destroyed: bool) -> None:
    first = Pair(stage)
    first.step_both(0)
    if is_destroyed:
        first.close()
    second = Pair(stage, first.model)
    second.step_both(1)
    second.assert_same_weights()
    second.close()


@pytest.mark.parametrize("is_destroyed", [True, False])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_model_given_to_initialize_again_trains_under_the_new_engine(run_ranks, stage, is_destroyed) -> None:
    run_ranks(started_again, 2, stage, is_destroyed)


def joint_loss(stage: int) -> None:
    first, second = Pair(stage, nn.Linear(6, 6), accumulation=2), Pair(stage, nn.Linear(6, 5), accumulation=2)
    for step in range(2):
        for micro in range(2):
            at = 2 * step + micro
            first.engine.backward(error(second.engine(first.engine(inputs(at, first.rank)))))
            first.engine.step()
            second.engine.step()
            first.twin_backward_of(lambda rank, at=at: error(second.twin(first.twin(inputs(at, rank)))), factor=0.5)
        first.twin_step()
        second.twin_step()
    for pair in (first, second):
        pair.assert_same_weights()
        pair.close()


@stages
def test_a_loss_through_two_engines_is_divided_once(run_ranks, stage) -> None:
    run_ranks(joint_loss, 2, stage)


def saliency(stage: int) -> int:
    from craken import comm

    pair = Pair(stage)
    x = inputs(0, pair.rank).requires_grad_()
    before = comm.bytes_sent()
    if pair.rank == 0 or stage == 3:  # there it takes all ranks to have the weights
        torch.autograd.grad(pair.engine(x).sum(), x)
    sent = comm.bytes_sent() - before
    with pytest.raises(RuntimeError, match="before backward"):
        pair.engine.step()
    pair.step_both(1)
    pair.assert_same_weights()
    pair.close()
    return sent


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_with_respect_to_inputs_on_one_rank_sends_nothing(run_ranks, stage) -> None:
    assert run_ranks(saliency, 2, stage) == [0, 0]


def test_a_gradient_with_respect_to_inputs_gathers_and_frees_at_stage_3(run_ranks) -> None:
    assert min(run_ranks(saliency, 2, 3)) > 0


def loaded_state(stage: int) -> None:
    import craken

    model = nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    engine, *_ = craken.initialize(model=model, optimizer=optimizer, config=config)
    model.load_state_dict({"weight": torch.full((4, 4), 0.5), "bias": torch.zeros(4)})
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).float().sum())
    engine.step()
    assert (value(model.weight) == 0.5).all(), "the old master weights came back"
    with pytest.raises(RuntimeError, match="add_param_group"):
        engine.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    engine.destroy()


@stages
def test_weights_loaded_into_the_module_are_what_trains_on(run_ranks, stage) -> None:
    run_ranks(loaded_state, 2, stage)
