"""The engine on one rank: what users ask of it besides training."""

import csv
import logging
import re

import pytest
import torch
from torch import nn

import craken
from craken.comm import is_initialized, shutdown
from craken.engine import see_memory_usage
from craken.log import log_dist


@pytest.fixture
def start():
    engines = []

    def initialize(model=None, **config):
        base = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
        arguments = {key: config.pop(key) for key in ("lr_scheduler", "optimizer_object") if key in config}
        if "optimizer_object" in arguments:
            arguments["optimizer"] = arguments.pop("optimizer_object")
        engine, *_ = craken.initialize(model=model or nn.Linear(4, 3), config={**base, **config}, **arguments)
        engines.append(engine)
        return engine

    yield initialize
    for engine in engines:
        engine.destroy()
    shutdown()


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    messages = []
    monkeypatch.setattr(logging.getLogger("craken"), "handle", lambda record: messages.append(record.getMessage()))
    return messages


def take_step(engine, dtype=torch.float32):
    engine.backward(engine(torch.ones(2, 4, dtype=dtype)).float().square().mean())
    engine.step()


def test_unknown_attributes_come_from_the_module(start):
    engine = start()
    assert engine.in_features == 4
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        engine.nonsense


def test_the_config_is_the_dict_that_was_given(start):
    config = {"train_micro_batch_size_per_gpu": 1}
    engine, *_ = craken.initialize(model=nn.Linear(2, 2), config=config)
    assert engine.config is config
    engine.destroy()


def test_sizes_and_their_change(start):
    engine = start(gradient_accumulation_steps=3)
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (6, 2)
    engine.set_train_batch_size(8)
    assert engine.gradient_accumulation_steps() == 4
    with pytest.raises(ValueError, match="expected a multiple of micro-batch 2 x 1 ranks = 2, got 7"):
        engine.set_train_batch_size(7)


def test_a_torch_schedule_may_be_built_on_the_returned_optimizer(start):
    engine = start()
    schedule = torch.optim.lr_scheduler.LambdaLR(engine.optimizer, lambda step: 0.5**step)
    take_step(engine)
    schedule.step()
    assert engine.get_lr() == [0.05]


def test_a_schedule_given_as_a_function_steps_with_the_engine(start):
    engine = start(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1))
    take_step(engine)
    assert engine.get_lr() == [pytest.approx(0.01)]
    assert engine.was_step_applied()


def test_scalars_go_to_csv_files(start, tmp_path):
    engine = start(csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"})
    take_step(engine)
    take_step(engine)
    with (tmp_path / "job" / "Train_Samples_train_loss.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["samples", "Train/Samples/train_loss"]
    assert [int(samples) for samples, _ in rows[1:]] == [2, 4]
    assert float(rows[2][1]) != float(rows[1][1])


@pytest.mark.parametrize("section", ["tensorboard", "wandb"])
def test_a_monitor_whose_package_is_missing_is_refused_before_ranks_meet(start, monkeypatch, section):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{section}.enabled .* missing here: pip install 'craken\[monitor\]'"):
        start(**{section: {"enabled": True}})
    assert not is_initialized()


def test_a_data_set_is_batched_by_the_users_collate_fn():
    config = {"train_micro_batch_size_per_gpu": 2}
    engine, _, batches, _ = craken.initialize(
        model=nn.Linear(1, 1), config=config, training_data=list("abcd"), collate_fn="+".join
    )
    assert sorted(letter for batch in batches for letter in batch.split("+")) == list("abcd")
    engine.destroy()
    shutdown()


def test_no_process_group_is_made_where_the_user_said_not_to():
    with pytest.raises(ValueError, match="dist_init_required"):
        craken.initialize(model=nn.Linear(1, 1), config={"train_micro_batch_size_per_gpu": 2}, dist_init_required=False)
    assert not is_initialized()


@pytest.mark.parametrize(("ranks", "expected"), [(None, ["hello"]), ([1], []), ([-1], ["[rank 0] hello"])])
def test_log_dist_speaks_on_the_ranks_named(lines, ranks, expected):
    log_dist("hello", ranks=ranks)
    assert lines == expected


def test_memory_is_shown_when_forced(lines):
    see_memory_usage("before")
    see_memory_usage("after", force=True)
    (line,) = lines
    assert line.startswith("after | ")
    assert re.search(r"GiB in use, \d.* GiB at peak of \d.*; host: \d.* GiB used", line)


def test_progress_and_time_are_printed_when_asked_for(start, lines):
    engine = start(steps_per_print=2, wall_clock_breakdown=True)
    for _ in range(4):
        take_step(engine)
    progress = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in progress] == ["step 2", "step 4"]
    assert "loss" in progress[0]
    assert "grad norm" in progress[0]
    times = [line for line in lines if line.startswith("time a step: forward")]
    assert len(times) == 2
    assert "backward" in times[0]


def test_fp16_casts_inputs_when_asked_to(start):
    engine = start(fp16={"enabled": True, "auto_cast": True, "initial_scale_power": 4})
    assert engine(torch.ones(1, 4)).dtype == torch.float16


def test_autocast_keeps_parameters_in_fp32(start):
    engine = start(torch_autocast={"enabled": True, "dtype": "bfloat16"})
    assert engine(torch.ones(1, 4)).dtype == torch.bfloat16
    assert engine.weight.dtype == torch.float32


def test_a_bare_fp16_backward_without_the_scale_is_refused(start):
    engine = start(fp16={"enabled": True, "initial_scale_power": 4})
    loss = engine(torch.ones(1, 4).half()).float().sum()
    with pytest.raises(RuntimeError, match=r"expected engine.scale\(loss\).backward\(\)"):
        loss.backward()
    assert all(param.grad is None for param in engine.parameters()), "the next backward would add to what was refused"
    engine.scale(engine(torch.ones(1, 4).half()).float().sum()).backward()
    engine.step()
    assert engine.was_step_applied()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (3.0, "expected a scalar tensor, got a float"),
        (torch.ones(2, requires_grad=True) * 2, r"expected one number, got shape \(2,\)"),
        (torch.ones(()), "this loss has no graph"),
    ],
)
def test_a_loss_that_cannot_be_used_is_explained(start, loss, message):
    with pytest.raises(ValueError, match=message):
        start().backward(loss)


def test_calls_in_a_wrong_order_are_explained(start):
    engine = start()
    with pytest.raises(RuntimeError, match=r"step\(\) before backward\(\)"):
        engine.step()
    with pytest.raises(RuntimeError, match=r"call engine.step\(\)"):
        engine.optimizer.step()
    with engine.no_sync(), pytest.raises(RuntimeError, match=r"no_sync\(\) inside of no_sync"):
        engine.no_sync().__enter__()
    sharded = start(zero_optimization={"stage": 2})
    with pytest.raises(RuntimeError, match="Use stage 0 or 1"):
        sharded.no_sync().__enter__()


def test_without_an_optimizer_the_engine_evaluates_and_says_so(start):
    engine, optimizer, *_ = craken.initialize(model=nn.Linear(4, 3), config={"train_micro_batch_size_per_gpu": 1})
    assert optimizer is None
    assert engine(torch.ones(1, 4)).shape == (1, 3)
    with pytest.raises(RuntimeError, match="without an optimizer"):
        engine.step()


def test_a_destroyed_engine_leaves_a_module_for_another(start):
    model = nn.Linear(4, 3)
    first = start(model)
    take_step(first)
    first.destroy()
    second = start(model, zero_optimization={"stage": 2})
    take_step(second)
    second.check_integrity()


def test_state_of_an_optimizer_that_has_run_is_kept(start):
    model, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1) for one in (model, twin)]
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        one(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    engine = start(model, optimizer_object=optimizers[0], zero_optimization={"stage": 2}, gradient_clipping=0.0)
    take_step(engine)
    twin(torch.ones(2, 4)).square().mean().backward()
    optimizers[1].step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-6, atol=1e-7)
