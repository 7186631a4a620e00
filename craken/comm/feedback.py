"""What 4-bit codes lost of earlier gradients, given to those that follow (LoCo, arXiv 2407.04480).

    wanted  = gradient + error
    sent    = codes of wanted
    error'  = beta x error + (1 - beta) x (wanted - what the codes say)      zero again every `reset_after` times

A gradient too small for its block's codes is thus sent once it has added up. Errors are kept with 8 bits an element.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from craken.comm.codec import Codec

_SENT, _KEPT = Codec(4), Codec(8)


class ErrorFeedback:
    """The errors of what is sent under each key: 1 + 1/64 bytes an element, where the gradients are."""

    def __init__(self, *, beta: float, reset_after: int) -> None:
        """beta: how much of the old error stays (0 to 1); reset_after: how many times until it is forgotten."""
        self._beta, self._reset_after = beta, reset_after
        self._errors: dict[Hashable, Tensor] = {}
        self._times: dict[Hashable, int] = {}

    def quantise(self, key: Hashable, values: Tensor, messages: Tensor) -> None:
        """Write `values` [rows, n] and the error kept under `key` into `messages` (4 bits), and keep what they lost."""
        shape = (values.shape[0], _KEPT.num_bytes(values.shape[1]))
        error = self._errors.setdefault(key, torch.zeros(shape, dtype=torch.uint8, device=values.device))
        wanted = values.to(torch.float32, copy=True)
        _KEPT.dequantise(error, wanted, add=True)
        _SENT.quantise(wanted, messages)
        self._times[key] = self._times.get(key, 0) + 1
        if self._times[key] % self._reset_after == 0:
            error.zero_()
        else:
            self._keep(error, wanted, messages)

    def _keep(self, error: Tensor, wanted: Tensor, messages: Tensor) -> None:
        said = torch.empty_like(wanted)
        _SENT.dequantise(messages, said)
        lost = wanted.sub_(said)
        _KEPT.dequantise(error, said)  # the old error
        new = torch.lerp(lost, said, self._beta)
        _KEPT.quantise(torch.where(new.isfinite(), new, said), error)  # an overflow leaves no mark
