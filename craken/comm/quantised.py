"""Collectives that send small integers in place of floats (ZeRO++, arXiv 2306.10209): values a transport wraps another.

    QuantisedGather   all-gather      8 bits an element: half of bf16

                      shard -> codes ==> everyone's codes -> full        the owner too takes what its codes say

    QuantisedReduce   reduce-scatter  4 bits an element and hop: a quarter of bf16

                      full -> codes ==inner axis==> sums in fp32 -> codes ==outer axis==> sums in fp32 -> shard

Sums are taken between hops in fp32 and sent on as codes of their own; what a rank adds of its own is exact. On one node
there is one hop.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from craken.comm.codec import Codec
from craken.comm.feedback import ErrorFeedback
from craken.comm.transport import Channel, Pending

_EIGHT, _FOUR = Codec(8), Codec(4)


class QuantisedGather:
    """Gathers floats as 8-bit codes; every rank ends with the same bits. Sums, and other dtypes, go as they are."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.reduce_scatter = channel.transport.reduce_scatter
        self.all_to_all = channel.transport.all_to_all

    def all_gather(self, full: Tensor, *, label: str) -> Pending:
        axis = self._channel.axis
        if not full.is_floating_point() or full.dtype.itemsize == 1 or axis.size == 1:
            return self._channel.transport.all_gather(full, label=label)
        rows = full.view(axis.size, -1)
        messages = _messages(_EIGHT, (axis.size,), rows.shape[1], full)
        _EIGHT.quantise(rows.narrow(0, axis.rank, 1), messages.narrow(0, axis.rank, 1))
        gather = self._channel.transport.all_gather(messages.view(-1), label=label)

        def finish() -> None:
            if messages.is_cuda:  # it may have been started on another stream, whose memory this is
                messages.record_stream(torch.cuda.current_stream())
            _EIGHT.dequantise(messages, rows)

        return Pending([gather], finish, f"quantised all-gather of {label}")


class QuantisedReduce:
    """Sums over an axis that is split in two, as 4-bit codes on each of the two hops; gathers go as they are."""

    def __init__(
        self, whole: Channel, inner: Channel, outer: Channel, *, feedback: ErrorFeedback | None = None
    ) -> None:
        """`inner` and `outer` are the parts of `whole`, as `split_axis` makes them, and serve nothing else.

        feedback: keeps what codes lose, a label at a time; labels then tell what is summed.
        """
        if inner.axis.size * outer.axis.size != whole.axis.size:
            raise ValueError(
                f"{inner.axis.size} ranks of {inner.axis.name} x {outer.axis.size} of {outer.axis.name} are not the "
                f"{whole.axis.size} of {whole.axis.name}"
            )
        self._inner, self._outer, self._feedback = inner, outer, feedback
        self.all_gather = whole.transport.all_gather
        self.all_to_all = whole.transport.all_to_all

    def reduce_scatter(self, full: Tensor, own: Tensor, out: Tensor, *, add: bool, label: str) -> Pending:
        inner, outer = self._inner.axis, self._outer.axis
        slices = full.view(outer.size, inner.size, -1)  # [node, rank in it, shard_numel]
        outbox = _messages(_FOUR, (inner.size, outer.size), slices.shape[2], full)
        for peer in _peers(inner.rank, inner.size):
            self._quantise((label, peer), slices[:, peer], outbox[peer])
        inbox = torch.empty_like(outbox)
        hop = self._inner.transport.all_to_all(outbox.view(inner.size, -1), inbox.view(inner.size, -1), label=label)

        def finish() -> None:
            sums = slices[:, inner.rank].to(torch.float32, copy=True)  # [node, shard_numel]
            sums[outer.rank].copy_(own)
            for peer in _peers(inner.rank, inner.size):
                _FOUR.dequantise(inbox[peer], sums, add=True)
            total = self._sum_over_nodes(sums, label)
            out.add_(total) if add else out.copy_(total)

        return Pending([hop], finish, f"quantised reduce-scatter of {label}")

    def _sum_over_nodes(self, sums: Tensor, label: str) -> Tensor:
        """Collective over the outer axis: return this rank's row of the sum of all nodes' `sums`."""
        axis = self._outer.axis
        mine = sums.narrow(0, axis.rank, 1)
        if axis.size > 1:
            outbox = _messages(_FOUR, (axis.size,), sums.shape[1], sums)
            self._quantise((label, "between nodes"), sums, outbox)
            inbox = torch.empty_like(outbox)
            self._outer.transport.all_to_all(outbox, inbox, label=label).wait()
            for peer in _peers(axis.rank, axis.size):
                _FOUR.dequantise(inbox.narrow(0, peer, 1), mine, add=True)
        return mine[0]

    def _quantise(self, key: Hashable, values: Tensor, messages: Tensor) -> None:
        if self._feedback is None:
            _FOUR.quantise(values, messages)
        else:
            self._feedback.quantise(key, values, messages)


def _messages(codec: Codec, shape: tuple[int, ...], numel: int, like: Tensor) -> Tensor:
    return torch.empty((*shape, codec.num_bytes(numel)), dtype=torch.uint8, device=like.device)


def _peers(rank: int, size: int) -> list[int]:
    """Return the other ranks in the order in which sums run: own+1, own+2, ..."""
    return [(rank + step) % size for step in range(1, size)]
