"""The step on master shards: agree, take the norm, clip, update, bring the parameters up to date.

    votes    one all-reduce of [sum of squares, pending flag a group, touched flag a parameter]   (float64)
    scale    mean over ranks, loss scale and clipping are one division, inside the fused kernel where it takes one
    update   some groups at a time, so that their all-gathers run while the next ones are updated

A parameter that no rank touched in the whole step is skipped as in plain PyTorch: no decay, no state. Norms are in fp32
over pieces of about 100 k elements and combined in fp64: one flat fp32 norm of 30 M elements is off by 0.17 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craken.comm import MeshAxis, Pending, all_reduce_sum, move_to_axis_device, phase
from craken.zero.binding import Binding
from craken.zero.group import MasterFragment, ShardGroup
from craken.zero.reducer import GradientReducer

_NORM_PIECE = 100_000  # elements
_NUM_CHUNKS = 8  # an update in more pieces overlaps no more and costs a call of the optimizer each


@dataclass(frozen=True)
class Stepping:
    """How an optimizer may be driven: in chunks of parameters one after another, and whether it divides gradients."""

    in_chunks: bool
    takes_grad_scale: bool


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
        self, binding: Binding, groups: Sequence[ShardGroup], reducer: GradientReducer, stepping: Stepping
    ) -> None:
        self.optimizer, self.groups = binding.optimizer, list(groups)
        self._reducer, self._stepping = reducer, stepping
        self._fragments = [binding.fragments(index) for index in range(len(groups))]

    def step(self, *, divisor: float, max_norm: float, skip_nonfinite: bool) -> StepResult:
        """Collective over the axis: update parameters with the gradients gathered since the last step, and drop them.

        divisor: what the summed gradients must be divided by (ranks x loss scale). max_norm: 0 clips nothing.
        """
        votes = self._agree()
        norm = math.sqrt(votes.sum_of_squares) / divisor if votes.sum_of_squares >= 0 else math.nan
        is_finite = math.isfinite(norm)
        applies = is_finite or not skip_nonfinite
        if applies:
            clip = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
            self._update(votes.touched, divisor / clip)
        for group in self.groups:
            group.gradients.drop()
        return StepResult(norm, is_finite, applies)

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
        axis, num_groups = self.groups[0].wire.axis, len(self.groups)
        flags = [float(pending) for pending in self._reducer.pending_groups()]
        flags += [float(touched) for group in self.groups for touched in group.gradients.touched]
        squares = sum_of_squares(group.gradients.own_reduced() for group in self.groups if group.gradients.has_reduced)
        ballot = torch.tensor([0.0, *flags], dtype=torch.float64)
        ballot[0] = squares
        counted = _all_reduce(ballot, axis).tolist()
        touched, at = [], 1 + num_groups
        for group in self.groups:
            touched.append([count > 0 for count in counted[at : at + len(group.params)]])
            at += len(group.params)
        pending = [index for index in range(num_groups) if counted[1 + index] > 0]
        return _Votes(counted[0], pending, touched)

    # --- update -------------------------------------------------------------------------------------------------------

    def _update(self, touched: Sequence[Sequence[bool]], scale: float) -> None:
        gathers: list[Pending] = []
        num_groups = len(self.groups)
        at_once = max(1, -(-num_groups // _NUM_CHUNKS)) if self._stepping.in_chunks else max(1, num_groups)
        for start in range(0, num_groups, at_once):
            indices = range(start, min(start + at_once, num_groups))
            self._step_groups(indices, touched, scale)
            for index in indices:
                gathers += self._refresh(index)
        with phase("zero::wait_gather"):
            for gather in gathers:
                gather.wait()

    def _refresh(self, index: int) -> list[Pending]:
        with phase("zero::refresh", self.groups[index].label):
            gather = self.groups[index].refresh()
        return [] if gather is None else [gather]

    def _step_groups(self, indices: Iterable[int], touched: Sequence[Sequence[bool]], scale: float) -> None:
        active = []
        for index in indices:
            group = self.groups[index]
            if not group.gradients.has_reduced:
                continue
            grads = group.gradients.reduced.to(group.master.dtype)
            if not self._stepping.takes_grad_scale and scale != 1.0:
                grads.div_(scale)
            for fragment in self._fragments[index]:
                if touched[index][fragment.slot]:
                    fragment.tensor.grad = _grad_of(fragment, group, grads)
                    active.append(fragment.tensor)
        if active:
            self._run_optimizer(active, scale)

    def _run_optimizer(self, active: Sequence[nn.Parameter], scale: float) -> None:
        if self._stepping.takes_grad_scale and scale != 1.0:
            self.optimizer.grad_scale = torch.tensor(scale, device=active[0].device)  # type: ignore[attr-defined]
        try:
            with phase("zero::step"):
                self.optimizer.step()
        finally:
            for param in active:
                param.grad = None
            if hasattr(self.optimizer, "grad_scale"):
                del self.optimizer.grad_scale


def sum_of_squares(flats: Iterable[Tensor]) -> Tensor:
    """Return the sum of squares of all elements as a float64 scalar; inf or nan if any element is."""
    sums = [torch.stack(list(_norms(torch.split(flat, _NORM_PIECE)))).double().square_().sum() for flat in flats]
    return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)


def _norms(pieces: Sequence[Tensor]) -> Sequence[Tensor]:
    dtype = pieces[0].dtype
    if dtype.itemsize < 4 and not pieces[0].is_cuda:
        # the CPU's norm of 16-bit elements is five times slower than a cast that stays in the cache
        return [torch.linalg.vector_norm(piece.float()) for piece in pieces]
    return torch._foreach_norm(list(pieces), 2.0, torch.promote_types(dtype, torch.float32))


def _all_reduce(ballot: Tensor, axis: MeshAxis) -> Tensor:
    return all_reduce_sum(move_to_axis_device(ballot, axis), axis, label="norm and votes")


def _grad_of(fragment: MasterFragment, group: ShardGroup, grads: Tensor) -> Tensor:
    # grads and master have the same layout, so a fragment's gradient lies where the fragment lies in the master
    offset = fragment.tensor.storage_offset() - group.master.storage_offset() if fragment.spec.numel else 0
    return grads.narrow(0, offset, fragment.spec.numel).view(fragment.tensor.shape)
