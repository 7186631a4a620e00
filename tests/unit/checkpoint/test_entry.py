"""Pieces: what can be stored, and under which name."""

from __future__ import annotations

import pytest
import torch

from craken.checkpoint.entry import Piece, can_store, code_of, dtype_of, entry_of, memory_of
from craken.spec import ShardSpec
from tests.unit.checkpoint.ranks import shard, whole


def test_a_whole_tensor_keeps_its_name_and_a_part_says_where_it_starts() -> None:
    full = torch.arange(12.0).reshape(3, 4)
    assert entry_of(whole("param", "a.b", full)).stored_name == "param:a.b"
    part = entry_of(shard("exp_avg", "a.b", full, 5, 9))
    assert (part.stored_name, part.num_bytes, part.dtype) == ("exp_avg:a.b@5", 16, "F32")


def test_dtype_codes_are_those_of_safetensors() -> None:
    types = pytest.importorskip("safetensors.torch")._TYPES
    ours = {code: dtype_of(code) for code in types if can_store(torch.empty(1, dtype=types[code]))}
    assert ours == types
    assert code_of(torch.bfloat16) == "BF16"


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("p", ShardSpec("w", (4,), 0, 4), torch.zeros(3)), "p of w: expected a contiguous tensor of 4 elements"),
        (Piece("p", ShardSpec("w", (2, 3), 0, 6), torch.zeros(3, 2).t()), r"strides \(1, 2\)"),
        (
            Piece("p", ShardSpec("w", (1,), 0, 1), torch.zeros(1, dtype=torch.complex128)),
            "complex128.*be stored",
        ),
        (Piece("p", ShardSpec("w", (1,), 0, 1), torch.zeros(1, device="meta")), "on meta"),
        (Piece("a:b", ShardSpec("w", (1,), 0, 1), torch.zeros(1)), "without ':', got 'a:b'"),
        (Piece("p", ShardSpec("w", (2,), 0, 2), torch.eye(2).to_sparse()), "sparse_coo"),
    ],
)
def test_a_piece_that_cannot_be_stored_is_refused_by_name(piece: Piece, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry_of(piece)


def test_memory_is_shared_not_copied() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    memory_of(tensor)[:2] = b"\x80\x3f"
    assert tensor.tolist() == [1.0, 0.0, 0.0, 0.0]
