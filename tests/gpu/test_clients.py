"""On CUDA, one rank over NCCL: what tests of accelerate, transformers, PEFT and TRL show on CPUs holds here, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.clients import test_accelerate_lifecycle as lifecycle
from tests.clients import test_accelerate_loops as loops
from tests.clients import test_quantised_lora as quantised_lora
from tests.clients import test_trainer_stages as trainer_stages
from tests.clients import test_trl_generation as trl_generation
from tests.clients import test_trl_preferences as trl_preferences
from tests.clients import test_trl_sft as trl_sft
from tests.clients import trl_runs
from tests.clients.auto_configs import trainer_config
from tests.clients.clients_common import assert_same, ds_config, fresh_clients, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device on this machine"),
]


def over_nccl(function: Callable[..., Any], *args: Any) -> Any:
    import deepspeed

    deepspeed.init_distributed()
    assert torch.distributed.get_backend() == "nccl"
    return function(*args)


@pytest.fixture
def run_on_device(run_ranks) -> Callable[..., Any]:
    """Return `run(function, *args)`: its result in a process of one rank whose world is up."""

    def run(function: Callable[..., Any], *args: Any) -> Any:
        return run_ranks(over_nccl, 1, function, *args, joins_world=False, timeout_s=150.0)[0]

    return run


@pytest.mark.parametrize("device", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_trainer_trains_evaluates_and_predicts_as_in_plain_pytorch(run_on_device, tmp_path: Path, stage, device):
    got = run_on_device(trainer_stages.train, str(tmp_path), trainer_config(stage, device, str(tmp_path)))
    expected = run_on_device(trainer_stages.train, str(tmp_path), None)
    assert_same(got.run, expected.run)
    assert got.eval_loss == pytest.approx(expected.eval_loss, abs=1e-5)
    torch.testing.assert_close(got.predictions, expected.predictions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accelerates_loop_trains_as_in_plain_pytorch(run_on_device, accumulation: int, stage: int) -> None:
    run = run_on_device(loops.loop, {"stage": stage, "gradient_clipping": 0.5}, accumulation, "AdamW")
    assert_same(run, run_on_device(loops.loop, None, accumulation, "AdamW"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(run_on_device, tmp_path: Path, stage: int) -> None:
    run_on_device(lifecycle.save_and_load, str(tmp_path), stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bits", ["none", "8-bit", "4-bit"])
def test_lora_trains_and_merges(run_on_device, tmp_path: Path, bits: str, stage: int) -> None:
    tiny_llama(hidden_size=128, intermediate_size=192).save_pretrained(tmp_path)
    run_on_device(quantised_lora.train_a_cell, str(tmp_path), bits, stage)


@pytest.mark.parametrize(("case", "has_adapter"), [("packed", False), ("chats", False), ("assistant", True)])
def test_trls_sft_learns_as_in_plain_pytorch(run_on_device, tmp_path: Path, case: str, has_adapter: bool) -> None:
    run_on_device(trl_sft.train_beside_plain_pytorch, str(tmp_path), case, has_adapter)


def test_trls_dpo_learns_as_in_plain_pytorch(run_on_device, tmp_path: Path) -> None:
    run_on_device(trl_preferences.train_beside_plain_pytorch, trl_preferences.write_assets(tmp_path), "dpo")


@pytest.mark.parametrize("gathers", [True, False])
def test_trls_grpo_learns_as_in_plain_pytorch(run_on_device, tmp_path: Path, gathers: bool) -> None:
    trl_runs.model().save_pretrained(tmp_path / "base")
    trl_runs.tokenizer().save_pretrained(tmp_path / "base")
    run_on_device(
        trl_generation.grpo_beside_plain_pytorch, str(tmp_path / "run"), str(tmp_path / "base"), False, gathers
    )


def loading_peak(folder: str) -> tuple[int, int]:
    """Load a model under stage 3 with its weights on the host; returns the device's most bytes, and the model's."""
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    with fresh_clients(is_sharded=True):
        alive = HfDeepSpeedConfig(ds_config(3, zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}}))
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model = LlamaForCausalLM.from_pretrained(folder)
        peak = torch.cuda.max_memory_allocated() - before
        del alive
        return peak, sum(param.ds_numel * param.element_size() for param in model.parameters())


def test_loading_never_holds_the_whole_model_on_the_device(run_on_device, tmp_path: Path) -> None:
    tiny_llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=12).save_pretrained(tmp_path)
    peak, whole = run_on_device(loading_peak, str(tmp_path))
    assert whole > 100e6
    assert peak < 0.4 * whole
