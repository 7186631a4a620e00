"""The shard group: parameters that communicate together, laid end to end in one flat buffer.

The parameters are views of the flat `full` buffer, so gathering it is one collective with no copy before or after, and
rank r's shard is its elements [r*S, (r+1)*S). Gradients come from autograd one tensor at a time and are copied (later:
added) into a flat buffer of the same layout. What happens to them follows from the group's row of the policy table:

    weights      with params SHARD, gather and free `full` around each use (weights.py)
    accumulate   autograd's tensor -> `pending` (scratch, full)
    start_reduce pending -> shards: a reduce-scatter leaves; with the optimizer FULL an all-gather follows it
    finish       the sum is in `reduced` (this rank's shard, or the full buffer), pending is free again
    refresh      master -> this rank's part of the weights; where they are kept whole, all-gather to the others

In fp32 the master *is* the rank's part of the full buffer. Sums are over ranks and micro-batches; the division by
their number happens once, in the optimizer's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from craken.comm import MeshAxis, Pending, Transport, broadcast
from craken.precision import Precision, master_dtype
from craken.spec import ShardSpec
from craken.zero.layout import Cut, Fragment, lay_out
from craken.zero.policy import Keep, Policy
from craken.zero.room import lasting_copy
from craken.zero.weights import ShardedWeights


@dataclass(frozen=True)
class Wire:
    """What a group talks through: the axis and what carries its collectives, and the device it lives on."""

    axis: MeshAxis
    transport: Transport
    device: torch.device


@dataclass(frozen=True)
class GroupRules:
    """What a group does with its numbers: the policy row, dtypes, how parameters may be cut, and the pre-division.

    `predivide` divides gradients before they travel, against overflow in fp16. `accumulates` says that a step has
    several micro-batches, so that gradients kept FULL are held between them; with one, they only pass through.
    `trains` false is for frozen parameters: no gradients, no optimizer, the shard of the weights is all there is.
    """

    policy: Policy
    precision: Precision
    cut: Cut = Cut.PACKED
    predivide: float = 1.0
    accumulates: bool = False
    trains: bool = True

    @property
    def retains_full_grads(self) -> bool:
        """The full gradient buffer stays until the step; otherwise it is scratch, and only the shard stays."""
        return self.policy.gathers_grads or (self.accumulates and self.policy.grads is Keep.FULL)

    def accumulating(self) -> GroupRules:
        """Return the rules for a step of several micro-batches."""
        accumulate = self.precision.accumulate or torch.float32
        return replace(self, accumulates=True, precision=replace(self.precision, accumulate=accumulate))


def _is_sole_owner(tensor: Tensor) -> bool:
    """Say whether no other tensor shares this one's storage; needs every other alias of `tensor` itself to be gone."""
    return _storage_uses(tensor) == _storage_uses(torch.empty(1))


def _storage_uses(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


@dataclass(frozen=True)
class MasterFragment:
    """The part of one parameter that this rank's optimizer updates: a view of the master buffer."""

    slot: int
    spec: ShardSpec
    tensor: nn.Parameter


class ShardGroup:
    """Parameters that communicate together, and the buffers they live in."""

    def __init__(
        self, names: Sequence[str], params: Sequence[nn.Parameter], dtype: torch.dtype, rules: GroupRules, wire: Wire
    ) -> None:
        """Collective over the axis: move `params` into one flat buffer; rank 0's values win on every rank."""
        self.names, self.params, self.rules, self.wire = list(names), list(params), rules, wire
        self.policy, self.label = rules.policy, names[0]
        self.shapes = [tuple(param.shape) for param in params]
        self.layout = lay_out([param.numel() for param in params], wire.axis.size, self._cut())
        self.dtype = dtype
        self.weights: ShardedWeights | None = None
        self.full, self.master = self._move_in()
        self.fragments = self._make_fragments()
        self._pending: Tensor | None = None
        self._filled = [False] * len(params)
        self._travelling: Tensor | None = None
        self._work: Pending | None = None
        self._reduced_shard: Tensor | None = None
        self._retained: Tensor | None = None
        self.has_reduced = False
        self.touched = [False] * len(params)

    def _cut(self) -> Cut:
        return self.rules.cut if self.policy.optimizer is Keep.SHARD else Cut.PACKED

    # --- construction -------------------------------------------------------------------------------------------------

    def _move_in(self) -> tuple[Tensor, Tensor]:
        """Return (full [padded_numel], master [padded_numel or shard_numel]) holding the parameters' values."""
        dtype = master_dtype(self.dtype) if self.rules.trains else self.dtype
        precise = torch.empty(self.layout.padded_numel, dtype=dtype, device=self.wire.device)
        for param, slot in zip(self.params, self.layout.slots, strict=True):
            precise.narrow(0, slot.offset, slot.numel).view(param.shape).copy_(param.data)
        self._zero_gaps(precise)
        broadcast(precise, self.wire.axis, label=self.label)
        full = precise if precise.dtype == self.dtype else precise.to(self.dtype)
        for param, slot in zip(self.params, self.layout.slots, strict=True):
            param.data = full.narrow(0, slot.offset, slot.numel).view(param.shape)
            param.grad = None
        if self.policy.optimizer is Keep.FULL:
            return full, precise
        own = self.own_part(precise)
        if self.policy.frees_params:
            master = own if full is precise else lasting_copy(own)
            self.weights = ShardedWeights(full, self.params, self.layout, self.wire.axis.rank)
            return self.weights.full, self.weights.shard if full is precise else master
        return full, own if full is precise else own.clone()

    def _make_fragments(self) -> list[MasterFragment]:
        if self.policy.optimizer is Keep.FULL:
            pieces = [Fragment(i, 0, slot.offset, slot.numel) for i, slot in enumerate(self.layout.slots)]
        else:
            pieces = self.layout.fragments(self.wire.axis.rank)
        return [self._fragment(piece) for piece in pieces]

    def _fragment(self, piece: Fragment) -> MasterFragment:
        shape = self.shapes[piece.slot]
        view = self.master.narrow(0, piece.shard_offset, piece.numel)
        if piece.numel == self.layout.slots[piece.slot].numel and self._keeps_shapes:
            view = view.view(shape)
        spec = ShardSpec(self.names[piece.slot], shape, piece.param_offset, piece.numel)
        return MasterFragment(piece.slot, spec, nn.Parameter(view, requires_grad=view.is_floating_point()))

    @property
    def _keeps_shapes(self) -> bool:
        return self.policy.optimizer is Keep.FULL or self.rules.cut is Cut.WHOLE

    def own_part(self, flat: Tensor) -> Tensor:
        """Return this rank's slice [shard_numel] of a flat buffer [padded_numel]."""
        return flat.narrow(0, self.wire.axis.rank * self.layout.shard_numel, self.layout.shard_numel)

    def _zero_gaps(self, flat: Tensor) -> None:
        for gap in self.layout.gaps():
            flat.narrow(0, gap.offset, gap.numel).zero_()

    # --- gradients ----------------------------------------------------------------------------------------------------

    def begin_accumulating(self) -> None:
        """Hold gradients over several micro-batches from now on, in fp32 unless the config names a dtype.

        For jobs that accumulate although their config says otherwise. Every rank does it before the same micro-batch.
        """
        if self.rules.accumulates:
            return
        self.rules = self.rules.accumulating()
        if self._pending is not None:
            self._pending = self._pending.to(self._pending_dtype)
        if self._retained is not None:
            self._retained = self._retained.to(self.accumulate_dtype)
        if self._reduced_shard is not None:
            shard, self._reduced_shard = self._reduced_shard.to(self.accumulate_dtype), None
            if self.rules.retains_full_grads:
                self._retained = self._scratch()
                self.own_part(self._retained).copy_(shard)
            else:
                self._reduced_shard = shard

    @property
    def accumulate_dtype(self) -> torch.dtype:
        return self.rules.precision.accumulate_for(self.dtype)

    @property
    def reduce_dtype(self) -> torch.dtype:
        return self.rules.precision.reduce_for(self.dtype)

    @property
    def _pending_dtype(self) -> torch.dtype:
        # held until the step: the accumulate dtype; on its way out at once: the dtype that travels
        return self.accumulate_dtype if self.rules.retains_full_grads else self.reduce_dtype

    @property
    def has_pending(self) -> bool:
        """Gradients have come that were not reduced yet."""
        return self._pending is not None

    @property
    def is_reducing(self) -> bool:
        return self._work is not None

    def accumulate(self, slot: int, grad: Tensor, factor: float) -> None:
        """Take a parameter's gradient, times `factor`; autograd's tensor is not needed afterwards."""
        if self._can_adopt(grad, factor):
            self._pending = grad.view(-1)
            self._filled[slot] = self.touched[slot] = True
            return
        if self._pending is None:
            self._pending = self._scratch()
        place = self.layout.slots[slot]
        view = self._pending.narrow(0, place.offset, place.numel).view(self.shapes[slot])
        if grad.layout is not torch.strided:
            grad = grad.to_dense()
        if self._filled[slot]:
            view.add_(grad, alpha=factor)
        elif factor == 1.0:
            view.copy_(grad)
        else:
            torch.mul(grad, factor, out=view) if grad.dtype == view.dtype else view.copy_(grad).mul_(factor)
        self._filled[slot] = self.touched[slot] = True

    def _can_adopt(self, grad: Tensor, factor: float) -> bool:
        """Say whether autograd's tensor can itself be the pending buffer: one parameter, no padding, no conversion.

        The sum is written into it, so nobody else may hold its memory: two gradients can be views of one storage.
        """
        return (
            len(self.params) == 1
            and self._pending is None
            and factor == 1.0
            and grad.layout is torch.strided
            and grad.is_contiguous()
            and grad.dtype == self._pending_dtype
            and grad.numel() == self.layout.padded_numel
            and _is_sole_owner(grad)
        )

    def start_reduce(self) -> None:
        """Collective over the axis: send what is pending (zeros where nothing came) on its way to the shards."""
        assert self._work is None, f"{self.label} is being reduced already"
        pending = self._completed_pending()
        own = self.own_part(pending)
        sums_in_place = self.rules.retains_full_grads
        out = own if sums_in_place else self._shard_for_sum()
        self._travelling = pending
        self._work = self.wire.transport.reduce_scatter(
            pending.to(self.reduce_dtype), own, out, add=self.has_reduced and not sums_in_place, label=self.label
        )

    def finish_sum(self) -> None:
        """Wait for the shard's sum; with the optimizer FULL, start gathering the sums of the other ranks."""
        assert self._work is not None, f"{self.label} is not being reduced"
        assert self._travelling is not None
        self._work.wait()
        self._work = None
        if self.policy.gathers_grads:
            self._work = self.wire.transport.all_gather(self._travelling, label=f"{self.label} (gradients)")
        else:
            self._settle()

    def finish_gather(self) -> None:
        """Wait until this rank holds what the optimizer needs."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._settle()

    def _settle(self) -> None:
        pending, self._travelling = self._travelling, None
        assert pending is not None
        if self._retained is not None:
            self._counted_part(self._retained).add_(self._counted_part(pending))
        elif self.rules.retains_full_grads:
            self._retained = pending
        self.has_reduced = True

    def _counted_part(self, full: Tensor) -> Tensor:
        """Return the part of a summed full buffer that is valid: all of it after an all-gather, else the own slice."""
        return full if self.policy.gathers_grads else self.own_part(full)

    def _scratch(self) -> Tensor:
        return torch.empty(self.layout.padded_numel, dtype=self._pending_dtype, device=self.wire.device)

    def _completed_pending(self) -> Tensor:
        pending, self._pending = self._scratch() if self._pending is None else self._pending, None
        for filled, slot in zip(self._filled, self.layout.slots, strict=True):
            if not filled:
                pending.narrow(0, slot.offset, slot.numel).zero_()
        self._zero_gaps(pending)
        self._filled = [False] * len(self.params)
        if self.rules.predivide != 1.0:
            pending.mul_(1.0 / self.rules.predivide)
        return pending

    def _shard_for_sum(self) -> Tensor:
        if self._reduced_shard is None:
            self._reduced_shard = torch.empty(
                self.layout.shard_numel, dtype=self.accumulate_dtype, device=self.wire.device
            )
        return self._reduced_shard

    @property
    def reduced(self) -> Tensor:
        """The summed gradient in the accumulate dtype: [shard_numel], or [padded_numel] with the optimizer FULL."""
        assert self.has_reduced, f"{self.label} has no reduced gradient"
        if self._retained is not None:
            return self._counted_part(self._retained)
        assert self._reduced_shard is not None
        return self._reduced_shard

    def own_reduced(self) -> Tensor:
        """Return the part [shard_numel] of the summed gradient that counts as this rank's, for norms."""
        return self.own_part(self.reduced) if self.policy.gathers_grads else self.reduced

    def drop_grads(self) -> None:
        """Forget all gradients and give their memory back: the next forward's activations can use it."""
        self._pending = self._retained = self._reduced_shard = None
        self._filled = [False] * len(self.params)
        self.touched = [False] * len(self.params)
        self.has_reduced = False

    # --- parameters ---------------------------------------------------------------------------------------------------

    def refresh(self) -> Pending | None:
        """Collective over the axis where the row says so: bring the updated master to every rank's parameters."""
        if self.master.dtype != self.dtype:
            self._kept_weights().copy_(self.master)
        if not self.policy.gathers_params_after_step:
            return None
        return self.wire.transport.all_gather(self.full, label=self.label)

    def take_from_params(self) -> None:
        """Make the parameters' values the master's, after somebody else has written to them."""
        if self.weights is not None:
            if not self.weights.is_whole:
                return
            self.weights.shard.copy_(self.own_part(self.full))
        if self.master.dtype != self.dtype:
            self.master.copy_(self._kept_weights())

    def collect_values(self) -> None:
        """Bring values that users gave the whole parameters (`.data = ...`) into the flat buffer they are views of."""
        for param, slot, shape in zip(self.params, self.layout.slots, self.shapes, strict=True):
            view = self.full.narrow(0, slot.offset, slot.numel).view(shape)
            if param.data.data_ptr() != view.data_ptr() and slot.numel:
                view.copy_(param.data)
                param.data = view

    def _kept_weights(self) -> Tensor:
        """Return the weights in the compute dtype that the master stands for."""
        if self.weights is not None:
            return self.weights.shard
        return self.full if self.policy.optimizer is Keep.FULL else self.own_part(self.full)

    def check_integrity(self) -> None:
        """Assert that parameters are views of the full buffer and that nothing is under way."""
        assert self._work is None, f"{self.label}: a collective is under way"
        assert self._travelling is None, f"{self.label}: a gradient buffer was forgotten"
        if self.weights is not None and not self.weights.is_whole:
            assert self.weights.num_bytes == 0, f"{self.label}: freed weights still take memory"
            assert all(tuple(param.shape) == (0,) for param in self.params), f"{self.label}: a parameter was not freed"
            return
        for name, param, slot, shape in zip(self.names, self.params, self.layout.slots, self.shapes, strict=True):
            place = self.full.data_ptr() + slot.offset * self.full.element_size()
            assert param.data.data_ptr() == place or slot.numel == 0, f"{name} is no view of its group's buffer"
            assert tuple(param.shape) == shape, f"{name} has shape {tuple(param.shape)}, expected {shape}"
