"""On CUDA: quantised messages are those of the host to the bit, and replicas and offload go together."""

from __future__ import annotations

import pytest
import torch

from craken.comm.codec import Codec
from tests.parity.case import Case
from tests.parity.mesh_run import train_each

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_messages_are_the_same_as_on_the_host(bits, dtype) -> None:
    codec = Codec(bits)
    values = torch.randn(3, 70_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[1, 300] = float("nan")
    results = []
    for device in ("cpu", "cuda"):
        messages = torch.zeros(3, codec.num_bytes(70_001), dtype=torch.uint8, device=device)
        out = torch.zeros(3, 70_001, device=device)
        codec.quantise(values.to(device), messages)
        codec.dequantise(messages, out)
        results.append(out.cpu())
    assert torch.equal(results[0].nan_to_num(nan=-7.0), results[1].nan_to_num(nan=-7.0))


def test_replicas_of_offloaded_states_train_alike(run_ranks) -> None:
    """On one rank: the path of a gradient over the replicate axis and then to the host."""
    case = Case("bf16", 1, 3, clip=0.5, steps=8, device="cuda")
    offload = {"offload_optimizer": {"device": "cpu"}}
    zeros = [{}, offload, {"mics_shard_size": 1}, {"mics_shard_size": 1, **offload}]
    (trained,) = run_ranks(train_each, 1, case, zeros, joins_world=False)
    for offloaded, on_device in ((1, 0), (3, 2)):
        assert trained[offloaded].run.losses == pytest.approx(trained[on_device].run.losses, rel=5e-3)
    assert trained[2].run.losses == trained[0].run.losses
