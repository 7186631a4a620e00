"""The shard group: parameters that communicate together, laid end to end in one flat buffer.

The parameters are views of the flat `full` buffer, so gathering it is one collective with no copy before or after, and
rank r's shard is its elements [r*S, (r+1)*S). What happens to them follows from the group's row of the policy table:

    weights     with params SHARD, gather and free `full` around each use (weights.py)
    gradients   of the same layout, from autograd to the sum over ranks (gradients.py)
    refresh     master -> this rank's part of the weights; where they are kept whole, all-gather to the others

In fp32 the master *is* the rank's part of the full buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craken.comm import Pending, broadcast
from craken.precision import master_dtype
from craken.spec import ShardSpec
from craken.zero.flat import own_part, slot_view, zero_gaps
from craken.zero.gradients import GroupGradients
from craken.zero.layout import Cut, Fragment, lay_out
from craken.zero.policy import Keep
from craken.zero.room import lasting_copy
from craken.zero.rules import GroupRules, Wire
from craken.zero.weights import ShardedWeights


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
        self.gradients = GroupGradients(self.label, self.shapes, self.layout, dtype, rules, wire)

    def _cut(self) -> Cut:
        return self.rules.cut if self.policy.optimizer is Keep.SHARD else Cut.PACKED

    # --- construction -------------------------------------------------------------------------------------------------

    def _move_in(self) -> tuple[Tensor, Tensor]:
        """Return (full [padded_numel], master [padded_numel or shard_numel]) holding the parameters' values."""
        dtype = master_dtype(self.dtype) if self.rules.trains else self.dtype
        precise = torch.empty(self.layout.padded_numel, dtype=dtype, device=self.wire.device)
        for param, slot in zip(self.params, self.layout.slots, strict=True):
            slot_view(precise, slot, param.shape).copy_(param.data)
        zero_gaps(precise, self.layout)
        broadcast(precise, self.wire.axis, label=self.label)
        full = precise if precise.dtype == self.dtype else precise.to(self.dtype)
        for param, slot in zip(self.params, self.layout.slots, strict=True):
            param.data = slot_view(full, slot, param.shape)
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
        return own_part(flat, self.layout, self.wire.axis.rank)

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
            view = slot_view(self.full, slot, shape)
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
        self.gradients.check_integrity()
        if self.weights is not None and not self.weights.is_whole:
            assert self.weights.num_bytes == 0, f"{self.label}: freed weights still take memory"
            assert all(tuple(param.shape) == (0,) for param in self.params), f"{self.label}: a parameter was not freed"
            return
        for name, param, slot, shape in zip(self.names, self.params, self.layout.slots, self.shapes, strict=True):
            place = self.full.data_ptr() + slot.offset * self.full.element_size()
            assert param.data.data_ptr() == place or slot.numel == 0, f"{name} is no view of its group's buffer"
            assert tuple(param.shape) == shape, f"{name} has shape {tuple(param.shape)}, expected {shape}"
