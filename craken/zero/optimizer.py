"""The step on master shards: agree, take the norm, clip, update, bring the parameters up to date.

    votes    one all-reduce of [sum of squares, pending flag a group, touched flag a parameter]   (float64)
    scale    mean over ranks, loss scale and clipping are one division, inside the fused kernel where it takes one
    update   some groups at a time, so that their all-gathers run while the next ones are updated

A parameter that no rank touched in the whole step is skipped as in plain PyTorch: no decay, no state. Norms are in fp32
over pieces of about 100 k elements and combined in fp64: one flat fp32 norm of 30 M elements is off by 0.17 %.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craken.comm import Waitable, all_reduce_sum, phase
from craken.zero.binding import Binding
from craken.zero.group import MasterFragment, ShardGroup
from craken.zero.norms import sum_of_squares
from craken.zero.plans.chunks import Share, plan_chunks
from craken.zero.reducer import GradientReducer
from craken.zero.swapping import StateSwap


@dataclass(frozen=True)
class Stepping:
    """How an optimizer may be driven: in chunks of parameters one after another, and whether it divides gradients.

    max_numel: what one of its calls should not exceed, in elements.
    """

    in_chunks: bool
    takes_grad_scale: bool
    max_numel: int = sys.maxsize


@dataclass(frozen=True)
class StepResult:
    """What a step did. `grad_norm` is the L2 norm of the mean gradient before clipping, loss scale divided out."""

    grad_norm: float
    is_finite: bool
    was_applied: bool


@dataclass(frozen=True)
class _Votes:
    sum_of_squares: float
    pending: list[int]
    touched: list[list[bool]]


class ShardedStep:
    """Drives a torch optimizer over the master fragments of shard groups."""

    def __init__(
        self,
        binding: Binding,
        groups: Sequence[ShardGroup],
        reducer: GradientReducer,
        stepping: Stepping,
        swap: StateSwap | None = None,
    ) -> None:
        """swap: brings states to hand that rest in files."""
        self.optimizer, self.groups = binding.optimizer, list(groups)
        self._reducer, self._stepping, self._swap = reducer, stepping, swap
        self._scratch: Tensor | None = None
        self._left = [1.0] * len(groups)  # what a group's sum is still to be divided by after an update
        shares = [Share(group.master.numel(), group.rules.placement.states) for group in groups]
        every = [range(len(groups))] if groups else []
        self._chunks = plan_chunks(shares, max_numel=stepping.max_numel) if stepping.in_chunks else every
        self._fragments = [_in_order(binding.fragments(index), group) for index, group in enumerate(groups)]
        self._cuts = [_cuts(fragments, group) for fragments, group in zip(self._fragments, groups, strict=True)]

    def step(self, *, divisor: float, max_norm: float, skip_nonfinite: bool) -> StepResult:
        """Collective over all ranks that train: update parameters with the gradients since the last step; spend those.

        divisor: what the summed gradients must be divided by (ranks x loss scale). max_norm: 0 clips nothing.
        """
        for group in self.groups:
            group.check_params()
        votes = self._agree()
        norm = math.sqrt(votes.sum_of_squares) / divisor if votes.sum_of_squares >= 0 else math.nan
        is_finite = math.isfinite(norm)
        applies = is_finite or not skip_nonfinite
        if applies:
            clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
            try:
                self._update(votes.touched, divisor / clip)
            except BaseException:  # some groups are updated, and their gradients' memory is lent: no second try
                self._drop_gradients()
                raise
            for group, left in zip(self.groups, self._left, strict=True):
                group.gradients.spend(left)
        else:
            self._drop_gradients()
        return StepResult(norm, is_finite, applies)

    def _drop_gradients(self) -> None:
        for group in self.groups:
            group.gradients.drop()

    # --- agreement ----------------------------------------------------------------------------------------------------

    def _agree(self) -> _Votes:
        votes = self._vote()
        while votes.pending:
            with phase("zero::reduce_late"):
                self._reducer.reduce_now(votes.pending)
            votes = self._vote()
        return votes

    def _vote(self) -> _Votes:
        if not self.groups:
            return _Votes(0.0, [], [])
        self._reducer.sum_over_replicas()
        wire, num_groups = self.groups[0].wire, len(self.groups)
        squares = sum_of_squares(group.gradients.norms() for group in self.groups if group.gradients.has_reduced)
        # each shard votes as often as there are ranks that hold it
        ballot: list[float] = [squares / wire.num_replicas, *self._reducer.pending_groups()]
        for group in self.groups:
            ballot += group.gradients.touched
        votes = torch.frombuffer(array("d", ballot), dtype=torch.float64)
        counted = all_reduce_sum(votes, wire.everyone, label="norm and votes").tolist()
        touched, at = [], 1 + num_groups
        for group in self.groups:
            touched.append([count > 0 for count in counted[at : at + len(group.params)]])
            at += len(group.params)
        pending = [index for index in range(num_groups) if counted[1 + index] > 0]
        return _Votes(counted[0], pending, touched)

    # --- update -------------------------------------------------------------------------------------------------------

    def _update(self, touched: Sequence[Sequence[bool]], scale: float) -> None:
        arrivals: list[Waitable] = []
        for indices in self._chunks:
            # a run of one, where it matters
            with self._swap.at_hand(indices[0]) if self._swap is not None else contextlib.nullcontext():
                self._step_groups(indices, touched, scale)
                for index in indices:
                    with phase("zero::refresh", self.groups[index].label):
                        arrivals += self.groups[index].refresh()
        with phase("zero::wait_gather"):
            for arrival in arrivals:
                arrival.wait()
            if self._swap is not None:
                self._swap.wait()

    def _step_groups(self, indices: Sequence[int], touched: Sequence[Sequence[bool]], scale: float) -> None:
        active: list[nn.Parameter] = []
        for index in indices:
            group = self.groups[index]
            if not group.gradients.has_reduced:
                continue
            grads = self._in_master_dtype(group, is_alone=len(indices) == 1)
            is_copy = grads.data_ptr() != group.gradients.reduced.data_ptr()
            self._left[index] = scale if is_copy else 1.0  # whoever divides does so in place, fused kernels too
            if not self._stepping.takes_grad_scale and scale != 1.0:
                grads.div_(scale)
            active += self._hand_out(index, grads, touched[index])
        if active:
            self._run_optimizer(active, scale)

    def _hand_out(self, index: int, grads: Tensor, touched: Sequence[bool]) -> Iterator[nn.Parameter]:
        """Give the touched fragments of a group their gradients, and yield them."""
        # grads and master have the same layout, so a fragment's gradient lies where the fragment lies
        pieces = torch.split_with_sizes(grads, self._cuts[index])
        for fragment, grad in zip(self._fragments[index], pieces, strict=False):
            if touched[fragment.slot]:
                tensor = fragment.tensor
                tensor.grad = grad if tensor.dim() == 1 else grad.view(tensor.shape)
                yield tensor

    def _in_master_dtype(self, group: ShardGroup, *, is_alone: bool) -> Tensor:
        """Return the reduced gradient [as the master] in the master's dtype, until the next chunk's."""
        reduced, dtype = group.gradients.reduced, group.master.dtype
        if reduced.dtype == dtype or not (is_alone and group.gradients.leaves_device):
            return reduced.to(dtype)
        # on the host fresh memory costs more to fault in than to fill
        if self._scratch is None or self._scratch.numel() < reduced.numel():
            self._scratch = torch.empty_like(reduced, dtype=dtype)
        return self._scratch[: reduced.numel()].copy_(reduced)

    def _run_optimizer(self, active: Sequence[nn.Parameter], scale: float) -> None:
        if self._stepping.takes_grad_scale and scale != 1.0:
            self.optimizer.grad_scale = torch.full((), scale, device=active[0].device)  # type: ignore[attr-defined]
        try:
            with phase("zero::step"):
                self.optimizer.step()
        finally:
            for param in active:
                param.grad = None
            if hasattr(self.optimizer, "grad_scale"):
                del self.optimizer.grad_scale


def _in_order(fragments: Iterable[MasterFragment], group: ShardGroup) -> list[MasterFragment]:
    """Return fragments in the order in which they lie in the master, those without elements first."""
    return sorted(fragments, key=lambda fragment: (fragment.spec.numel > 0, fragment.tensor.storage_offset()))


def _cuts(fragments: Sequence[MasterFragment], group: ShardGroup) -> list[int]:
    """Return the sizes that cut a buffer of the master's layout into fragments in order, then what is left."""
    numels = [fragment.spec.numel for fragment in fragments]
    starts = itertools.accumulate(numels, initial=group.master.storage_offset())
    for fragment, start in zip(fragments, starts, strict=False):
        assert fragment.spec.numel == 0 or fragment.tensor.storage_offset() == start, f"a gap before {fragment.spec}"
    return [*numels, group.master.numel() - sum(numels)]
