"""Weight-only quantisation in the layouts that bitsandbytes keeps on disk, so that `from_pretrained` loads them.

    int8   weight int8 [out, in] = round(127 w / s), s = max |w| of the row: `SCB` fp32 [out]          8 bits + 32 / in
    int4   blocks of 64 elements of the flattened weight, divided by their largest magnitude: `absmax` fp32 [blocks],
           each element the number of the nearest of 16 levels (NF4, quantiles of a normal distribution; Dettmers et
           al., 2023), two a byte, the first in the upper half: `weight` uint8 [numel / 2, 1]          4.5 bits

Scales and codes are made in two passes over the weight, so neither needs it whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from craken.checkpoint.lazy import LazyTensor, of_tensor

Form = Literal["int8", "int4"]
BLOCK_NUMEL = 64
_ROWS_MULTIPLE = 32  # with fewer, bitsandbytes' kernels for some CPUs stop; with columns that cut a block too
# fmt: off
_NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def quantise(
    tensors: Mapping[str, LazyTensor], layers: Sequence[str], form: Form, compute_dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """Return `tensors` with the weights of `layers` quantised, their scales beside them; others as they are.

    ValueError when a layer has no floating-point matrix `LAYER.weight`.
    """
    chosen = {f"{layer}.weight" for layer in layers}
    for name in sorted(chosen):
        found = tensors.get(name)
        if found is None or len(found.shape) != 2 or not found.dtype.is_floating_point:
            what = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise ValueError(f"{name}: expected a floating-point matrix to quantise, got {what}")
    quantised: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name not in chosen:
            quantised[name] = tensor
        elif form == "int8":
            quantised |= _int8(name, tensor)
        else:
            quantised |= _nf4(name, tensor, compute_dtype)
    return quantised


def without_unfit(
    layers: Sequence[str], skipped: Sequence[str], tensors: Mapping[str, LazyTensor], form: Form
) -> tuple[list[str], list[str]]:
    """Move layers of `layers` whose shape not every bitsandbytes kernel takes to `skipped`; return both."""
    unfit = []
    for layer in layers if form == "int4" else ():
        found = tensors.get(f"{layer}.weight")
        if found is not None and len(found.shape) == 2:
            num_rows, num_columns = found.shape
            unfit += [layer] if num_rows % _ROWS_MULTIPLE or num_columns % BLOCK_NUMEL else []
    return [layer for layer in layers if layer not in set(unfit)], [*skipped, *unfit]


def config_section(form: Form, skipped: Sequence[str], compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json's `quantization_config`; `skipped` are the linear layers that keep their dtype."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": form == "int8",
        "load_in_4bit": form == "int4",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": sorted(skipped),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


def _int8(name: str, weight: LazyTensor) -> dict[str, LazyTensor]:
    num_rows, num_columns = weight.shape

    def scales(low: int, high: int) -> Tensor:
        parts = _parts(name, weight, low * num_columns, high * num_columns, num_columns)
        return torch.cat([part.view(-1, num_columns).abs().amax(dim=1) for part in parts])  # [high - low]

    def codes(low: int, high: int) -> Tensor:
        rows = _finite(name, weight.read(low, high)).view(-1, num_columns)
        largest = rows.abs().amax(dim=1, keepdim=True)
        return (rows * (127.0 / largest.clamp(min=torch.finfo(torch.float32).tiny))).round().to(torch.int8).view(-1)

    stem = name.removesuffix("weight")
    return {
        name: LazyTensor(weight.shape, torch.int8, codes, num_columns),
        f"{stem}SCB": LazyTensor((num_rows,), torch.float32, scales),
        f"{stem}weight_format": of_tensor(torch.zeros((), dtype=torch.uint8)),  # 0: rows
    }


def _nf4(name: str, weight: LazyTensor, compute_dtype: torch.dtype) -> dict[str, LazyTensor]:
    levels = torch.tensor(_NF4_LEVELS)
    bounds = (levels[1:] + levels[:-1]) / 2
    num_blocks, num_bytes = -(-weight.numel() // BLOCK_NUMEL), -(-weight.numel() // 2)
    unit = math.lcm(BLOCK_NUMEL, weight.unit)

    def scales(low: int, high: int) -> Tensor:
        parts = _parts(name, weight, low * BLOCK_NUMEL, min(high * BLOCK_NUMEL, weight.numel()), unit)
        return torch.cat([_blocks(part).abs().amax(dim=1) for part in parts])

    def codes(low: int, high: int) -> Tensor:
        parts = _parts(name, weight, 2 * low, min(2 * high, weight.numel()), unit)
        return torch.cat([_packed(part, bounds) for part in parts])

    facts = {
        "quant_type": "nf4",
        "blocksize": BLOCK_NUMEL,
        "dtype": str(compute_dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    return {
        name: LazyTensor((num_bytes, 1), torch.uint8, codes, unit // 2),
        f"{name}.absmax": LazyTensor((num_blocks,), torch.float32, scales, unit // BLOCK_NUMEL),
        f"{name}.quant_map": of_tensor(levels),
        f"{name}.quant_state.bitsandbytes__nf4": of_tensor(text),
    }


def _parts(name: str, weight: LazyTensor, low: int, high: int, unit: int) -> Iterator[Tensor]:
    """Yield elements [low, high) in fp32, a bounded number of whole units at a time."""
    step = max(weight.chunk_numel // unit, 1) * unit
    for start in range(low, high, step):
        yield _finite(name, weight.read(start, min(start + step, high)))


def _packed(values: Tensor, bounds: Tensor) -> Tensor:
    """Return the numbers of the levels nearest to flat `values`, two a byte."""
    blocks = _blocks(values)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = torch.bucketize(scaled.view(-1), bounds, out_int32=True).to(torch.uint8)
    return ((numbers[0::2] << 4) | numbers[1::2])[: -(-values.numel() // 2)]


def _blocks(values: Tensor) -> Tensor:
    """Return flat `values` as [blocks, 64], the last one filled up with zeros."""
    return pad(values, (0, -values.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)


def _finite(name: str, values: Tensor) -> Tensor:
    """Return `values` in fp32; ValueError where one is infinite or no number, which no scale fits."""
    values = values.float()
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} holds infinite values or NaN, which cannot be quantised")
    return values
