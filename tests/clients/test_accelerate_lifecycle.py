"""What users do around a loop of accelerate's: JSON with every "auto", save and load, state dicts, several models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

from tests.clients.auto_configs import auto_config
from tests.clients.clients_common import (
    TOKENS,
    Run,
    accelerator_of,
    assert_same,
    fresh_clients,
    plugin_of,
    run_parts,
    take_steps,
    tiny_config,
    tiny_llama,
    token_rows,
    whole_weights,
)

pytestmark = pytest.mark.clients
pytest.importorskip("accelerate", reason="needs accelerate (the hf extra)")
pytest.importorskip("transformers", reason="needs transformers (the hf extra)")


def auto_file(stage: int, device: str, accumulation: Any = "auto", folder: str = "") -> dict[str, Any]:
    offload = {"device": device, **({"nvme_path": folder} if device == "nvme" else {})}
    return {
        **auto_config(
            stage=stage,
            offload_optimizer=offload,
            offload_param=offload if stage == 3 else {"device": "none"},
            stage3_gather_16bit_weights_on_model_save="auto",
        ),
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        "gradient_accumulation_steps": accumulation,
        "steps_per_print": float("inf"),
    }


def from_a_file(config: dict[str, Any] | None, through_accelerate: bool) -> Run:
    """Train with DummyOptim and DummyScheduler, or with what the file means, made by hand."""
    from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    with fresh_clients(is_sharded=config is not None):
        options = {"gradient_accumulation_steps": 2} if config is None or through_accelerate else {}
        accelerator = accelerator_of(None if config is None else DeepSpeedPlugin(hf_ds_config=config), **options)
        model = tiny_llama()
        loader = torch.utils.data.DataLoader(token_rows(24), batch_size=2)
        if config is None:
            optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
            schedule: Any = WarmupDecayLR(optimizer, total_num_steps=3, warmup_max_lr=1e-2, warmup_num_steps=2)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        else:
            optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.1)
            schedule = DummyScheduler(optimizer, total_num_steps=6, warmup_num_steps=2)  # divided by the ranks
            model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        losses, norms = [], []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                optimizer.step()
                if config is not None or accelerator.sync_gradients:
                    schedule.step()
                optimizer.zero_grad()
                losses.append(accelerator.gather(loss.detach()).mean().item())
        assert len(norms) == len(losses) / 2
        run = Run(losses, norms, whole_weights(accelerator.unwrap_model(model)))
        accelerator.free_memory()
        return run


@pytest.mark.parametrize(
    ("stage", "device", "through_accelerate"),
    [
        (1, "none", True),
        (1, "cpu", False),
        (2, "none", False),
        (2, "cpu", True),
        (2, "nvme", True),
        (3, "none", True),
        (3, "cpu", False),
        (3, "nvme", True),
    ],
)
def test_a_file_with_every_auto_trains_as_what_it_means(
    run_ranks, tmp_path: Path, stage, device, through_accelerate
) -> None:
    config = auto_file(stage, device, "auto" if through_accelerate else 2, str(tmp_path))
    run = run_ranks(from_a_file, 2, config, through_accelerate)[0]
    assert_same(run, run_ranks(from_a_file, 2, None, True)[0])


def prepared(stage: int, **plugin: Any) -> Any:
    """Return accelerator, engine, optimizer, batches and schedule of a run that may begin."""
    return run_parts(accelerator_of(plugin_of(stage, gradient_clipping=0.5, **plugin)), tiny_llama())


def save_and_load(folder: str, stage: int) -> None:
    with fresh_clients(is_sharded=True):
        parts = prepared(stage)
        take_steps(parts, 0, 2)
        parts[0].save_state(folder)
        expected = take_steps(parts, 2, 5)
        parts[0].load_state(folder)
        assert take_steps(parts, 2, 5) == expected, "on the engine that saved"
        parts[0].free_memory()
    with fresh_clients(is_sharded=True):
        parts = prepared(stage)
        parts[0].load_state(folder)
        assert take_steps(parts, 2, 5) == expected, "as a process that has just begun"
        parts[0].free_memory()
    files = {path.name for path in Path(folder).iterdir()}
    assert {"latest", "pytorch_model", "scheduler.bin", "random_states_0.pkl", "zero_to_fp32.py"} <= files


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(run_ranks, tmp_path: Path, stage) -> None:
    run_ranks(save_and_load, 2, str(tmp_path), stage)


def model_out_of_it(folder: str, stage: int, is_tied: bool) -> None:
    """State dicts are whole, the model that comes out is the one that went in, and its file loads plainly."""
    from accelerate import load_checkpoint_in_model
    from transformers import LlamaForCausalLM

    with fresh_clients(is_sharded=True):
        accelerator = accelerator_of(plugin_of(stage, zero3_save_16bit_model=True))
        model = tiny_llama(tie_word_embeddings=is_tied)
        loader = torch.utils.data.DataLoader(token_rows(8), batch_size=2)
        engine, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
        assert accelerator.unwrap_model(engine) is model
        loss = engine(**next(iter(loader))).loss
        accelerator.backward(loss)
        optimizer.step()
        with torch.no_grad():
            logits = engine.eval()(input_ids=TOKENS).logits
        weights = whole_weights(model)
        state = accelerator.get_state_dict(engine)
        assert (state is None) == (stage == 3 and dist.get_rank() > 0)
        if state is not None:
            assert state.keys() == model.state_dict().keys()
            assert all(torch.equal(state[name], weight) for name, weight in weights.items())
        accelerator.save_model(engine, f"{folder}/weights", max_shard_size="20KB")
        accelerator.wait_for_everyone()
        accelerator.unwrap_model(engine).save_pretrained(
            f"{folder}/pretrained", is_main_process=accelerator.is_main_process, state_dict=state
        )
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    plain = LlamaForCausalLM(tiny_config(tie_word_embeddings=is_tied))
    load_checkpoint_in_model(plain, f"{folder}/weights")
    plain.tie_weights()
    for loaded in (plain, LlamaForCausalLM.from_pretrained(f"{folder}/pretrained")):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(input_ids=TOKENS).logits, logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_comes_out_as_it_was_trained(run_ranks, tmp_path: Path, stage, is_tied) -> None:
    run_ranks(model_out_of_it, 2, str(tmp_path), stage, is_tied)


def distilled(is_sharded: bool) -> Run:
    """Train a student under stage 2 on the answers of a teacher that is sharded for inference."""
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM

    with fresh_clients(is_sharded=is_sharded):
        plugins = {"student": plugin_of(2, gradient_clipping=1.0), "teacher": plugin_of(3)} if is_sharded else None
        accelerator = accelerator_of(plugins)
        student = tiny_llama()
        torch.manual_seed(9)
        teacher = LlamaForCausalLM(tiny_config(initializer_range=0.1)).requires_grad_(False)
        if is_sharded:
            accelerator.state.select_deepspeed_plugin("teacher")
            accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 2
            teacher = Accelerator().prepare(teacher)
            assert all(param.shape == (0,) for param in teacher.parameters())
            accelerator.state.select_deepspeed_plugin("student")
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(token_rows(24), batch_size=2)
        student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
        losses, norms = [], []
        for batch in loader:
            with torch.no_grad():
                answers = teacher.eval()(input_ids=batch["input_ids"]).logits
            loss = mse_loss(student(input_ids=batch["input_ids"]).logits, answers)
            accelerator.backward(loss)
            norms.append(float(accelerator.clip_grad_norm_(student.parameters(), 1.0)))
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
        run = Run(losses, norms, whole_weights(accelerator.unwrap_model(student)))
        accelerator.free_memory()
        return run


def test_a_model_trains_beside_another_with_settings_of_its_own(run_ranks) -> None:
    assert_same(run_ranks(distilled, 2, True)[0], run_ranks(distilled, 2, False)[0])


def free_and_again(stage: int) -> None:
    from tests.parity.heap import bytes_in_use

    with fresh_clients(is_sharded=True):
        runs, sizes = [], []
        for _ in range(3):
            parts = prepared(stage)
            runs.append(take_steps(parts, 0, 4))
            parts[0].free_memory()
            from accelerate.state import AcceleratorState

            del parts
            AcceleratorState._reset_state()
            sizes.append(bytes_in_use())
    assert runs[0] == runs[1] == runs[2]
    assert sizes[2] - sizes[1] < 50_000, "a run's model was kept"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_can_be_freed_and_training_begun_again(run_ranks, stage) -> None:
    run_ranks(free_and_again, 2, stage)


def trained_twice(is_sharded: bool) -> Run:
    """Free the accelerator and prepare the same model anew: it goes on from the weights it has."""
    with fresh_clients(is_sharded=is_sharded):
        accelerator = accelerator_of(plugin_of(3, gradient_clipping=0.5) if is_sharded else None)
        model = tiny_llama()
        losses, norms = [], []
        for _ in range(2):
            loader = torch.utils.data.DataLoader(token_rows(8), batch_size=2)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)  # not all of the first step's size
            engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            for batch in loader:
                loss = engine(**batch).loss
                accelerator.backward(loss)
                norms.append(float(accelerator.clip_grad_norm_(engine.parameters(), 0.5)))
                optimizer.step()
                optimizer.zero_grad()
                losses.append(accelerator.gather(loss.detach()).mean().item())
            engine, optimizer, loader = accelerator.free_memory(engine, optimizer, loader)
        return Run(losses, norms, whole_weights(model))


def test_the_same_model_can_be_trained_again_after_it_was_freed(run_ranks) -> None:
    assert_same(run_ranks(trained_twice, 2, True)[0], run_ranks(trained_twice, 2, False)[0])


def held(folder: str, stage: int, device: str) -> tuple[dict[str, int], int]:
    """Return what a rank holds by place after a step, and the number of parameters."""
    with fresh_clients(is_sharded=True):
        param_device = device if stage == 3 else "none"
        parts = prepared(
            stage,
            offload_optimizer_device=device,
            offload_optimizer_nvme_path=folder,
            offload_param_device=param_device,
            offload_param_nvme_path=folder,
        )
        take_steps(parts, 0, 1)
        ledger = parts[1].memory_ledger()
        numel = sum(weight.numel() for weight in whole_weights(parts[1].module).values())
        parts[0].free_memory()
        return ledger, numel


@pytest.mark.parametrize(
    ("stage", "device", "in_memory", "in_files"),
    [
        (0, "none", 4, 0),
        (1, "none", 2.5, 0),
        (1, "cpu", 2.5, 0),
        (1, "nvme", 1.5, 1.5),
        (2, "none", 2.5, 0),
        (2, "cpu", 2.5, 0),
        (2, "nvme", 1.5, 1.5),
        (3, "none", 2, 0),
        (3, "cpu", 2, 0),
        (3, "nvme", 0.5, 1.5),
    ],
)
def test_a_rank_of_two_holds_its_share(run_ranks, tmp_path: Path, stage, device, in_memory, in_files) -> None:
    """In fp32, in units of the weights' bytes: weights, gradients and Adam's two states; in files, masters apart."""
    for ledger, numel in run_ranks(held, 2, str(tmp_path), stage, device):
        units = {place: num_bytes / (4 * numel) for place, num_bytes in ledger.items()}
        assert units["device"] + units["host"] == pytest.approx(in_memory, rel=0.02)
        assert units["nvme"] == pytest.approx(in_files, rel=0.02)


def libraries_in_use(folder: str) -> tuple[int, set[str]]:
    """Return the bytes in files after a step with everything there, and the names of all libraries in memory."""
    ledger, _ = held(folder, 3, "nvme")
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return ledger["nvme"], {Path(line.split()[-1]).name for line in mapped if ".so" in line}


def test_offload_to_files_needs_no_libaio(run_ranks, tmp_path: Path) -> None:
    for in_files, libraries in run_ranks(libraries_in_use, 2, str(tmp_path)):
        assert in_files > 0
        assert any("torch_cpu" in name for name in libraries)
        assert [name for name in libraries if "aio" in name or "async_io" in name] == []
