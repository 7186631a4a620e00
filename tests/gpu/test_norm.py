"""On CUDA: norms of large flat buffers are as exact as the host's, of few tensors."""

from __future__ import annotations

import pytest
import torch

from craken.zero.norms import piece_norms, sum_of_squares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("numel", [1, 100_001, 50_000_003])
def test_a_large_norm_is_exact(numel: int, dtype: torch.dtype) -> None:
    flat = torch.empty(numel, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(0)).to(dtype)
    norms = piece_norms(flat)
    assert len(norms) == 1
    assert sum_of_squares([norms]) == pytest.approx(flat.double().square().sum().item(), rel=1e-6)
