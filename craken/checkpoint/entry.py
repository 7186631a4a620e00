"""What a rank hands in to be saved, and the facts about it that ranks exchange before they write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from craken.spec import ShardSpec

RANK_STATE = "rank_state"
SHARED_STATE = "shared_state"
RESERVED_KINDS = (RANK_STATE, SHARED_STATE)

_CODE_OF_DTYPE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_OF_CODE = {code: dtype for dtype, code in _CODE_OF_DTYPE.items()}


@dataclass(frozen=True)
class Piece:
    """One rank's part of a tensor: contiguous, `spec.numel` elements, on any device; borrowed until `save` returns.

    `kind` says which of a parameter's tensors it is ("param", "master", "exp_avg", ...). The same range handed in by
    several ranks counts as replicas: one of those ranks writes it.
    """

    kind: str
    spec: ShardSpec
    tensor: Tensor


class Entry(NamedTuple):
    """A piece without its data: `numel` elements of (kind, fqn) from `offset` on; `dtype` is the safetensors code."""

    kind: str
    fqn: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    numel: int

    @property
    def is_whole(self) -> bool:
        return self.numel == math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * dtype_of(self.dtype).itemsize

    @property
    def stored_name(self) -> str:
        """The piece's name in its safetensors file: `kind:fqn`, with `@offset` behind when it is not the whole."""
        return f"{self.kind}:{self.fqn}" + ("" if self.is_whole else f"@{self.offset}")


def entry_of(piece: Piece) -> Entry:
    """Check that `piece` can be stored and return its entry; ValueError naming the tensor otherwise."""
    name = f"{piece.kind} of {piece.spec.fqn}"
    if not piece.kind or ":" in piece.kind:
        raise ValueError(f"{name}: a kind is a non-empty word without ':', got {piece.kind!r}")
    if not can_store(piece.tensor):
        raise ValueError(
            f"{name}: a {piece.tensor.dtype} tensor ({piece.tensor.layout}, on {piece.tensor.device}) cannot be "
            f"stored; expected a dense tensor with data and one of {sorted(map(str, _CODE_OF_DTYPE))}"
        )
    if piece.tensor.numel() != piece.spec.numel or not piece.tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor of {piece.spec.numel} elements, as its spec says, got shape "
            f"{tuple(piece.tensor.shape)} with strides {tuple(piece.tensor.stride())}"
        )
    spec = piece.spec
    return Entry(piece.kind, spec.fqn, tuple(spec.global_shape), code_of(piece.tensor.dtype), spec.offset, spec.numel)


def can_store(tensor: Tensor) -> bool:
    """Whether `tensor` is dense, has data and a dtype that safetensors knows."""
    return tensor.layout == torch.strided and tensor.dtype in _CODE_OF_DTYPE and tensor.device.type != "meta"


def code_of(dtype: torch.dtype) -> str:
    """Return the safetensors code of `dtype`."""
    return _CODE_OF_DTYPE[dtype]


def dtype_of(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code; ValueError when there is none."""
    if code not in _DTYPE_OF_CODE:
        raise ValueError(f"expected a dtype code among {sorted(_DTYPE_OF_CODE)}, got {code!r}")
    return _DTYPE_OF_CODE[code]


def in_host_memory(tensor: Tensor) -> bool:
    """Whether files can be written from and read into `tensor`'s own memory."""
    return tensor.device.type == "cpu"


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous `tensor` as uint8 [num_bytes]; shares its storage."""
    return tensor.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)


def memory_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU `tensor` as a memoryview of bytes, without a copy."""
    return memoryview(bytes_of(tensor).numpy().data)
