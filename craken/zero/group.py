"""The shard group: parameters that communicate together, laid end to end in one flat buffer.

The parameters are views of the flat `full` buffer, so gathering it is one collective with no copy before or after, and
rank r's shard is its elements [r*S, (r+1)*S). What happens to them follows from the group's row of the policy table:

    weights     with params SHARD, gather and free `full` around each use (weights.py)
    gradients   of the same layout, from autograd to the sum over ranks (gradients.py)
    refresh     master -> this rank's part of the weights; where they are kept whole, all-gather to the others

In fp32 the master *is* the rank's part of the full buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craken.comm import Waitable, broadcast
from craken.precision import master_dtype
from craken.spec import ShardSpec
from craken.zero.flat import own_part, slot_view, zero_gaps
from craken.zero.gradients import GroupGradients
from craken.zero.memory.placement import Place
from craken.zero.memory.shelf import Kind, Resting
from craken.zero.plans.layout import Cut, Fragment, lay_out
from craken.zero.plans.policy import Keep
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
        """Collective over all ranks that train: move `params` into one flat buffer; rank 0's values win everywhere."""
        self.names, self.params, self.rules, self.wire = list(names), list(params), rules, wire
        self.policy, self.label = rules.policy, names[0]
        self.shapes = [tuple(param.shape) for param in params]
        self.layout = lay_out([param.numel() for param in params], wire.axis.size, self._cut())
        self.dtype = dtype
        self.weights: ShardedWeights | None = None
        self.master, self.master_file = self._move_in()
        self.fragments = [self._fragment(piece) for piece in self.pieces()]
        self.gradients = GroupGradients(self.label, self.shapes, self.layout, dtype, rules, wire)

    def _cut(self) -> Cut:
        return self.rules.cut if self.policy.optimizer is Keep.SHARD else Cut.PACKED

    # --- construction -------------------------------------------------------------------------------------------------

    def _move_in(self) -> Resting:
        """Set `full` [padded_numel], `kept` and whether the master is that; return the master.

        Both are [shard_numel], or [padded_numel] with the optimizer FULL.
        """
        precise = self._take_values()
        full = precise if precise.dtype == self.dtype else precise.to(self.dtype)
        for param, slot in zip(self.params, self.layout.slots, strict=True):
            param.data = slot_view(full, slot, param.shape)
            param.grad = None
        if self.policy.optimizer is Keep.FULL:
            self.full, self.kept, self.master_is_kept = full, full, full is precise
            return Resting(precise)
        place, kept, where = self.rules.placement, Resting(self.own_part(full)), Place.DEVICE
        if self.policy.frees_params:
            where = place.weights
            kept = self._rest(where, kept.flat, "weights", place.pins_weights)
        self.master_is_kept = full is precise and (where is place.states or not self.rules.trains)
        master = kept
        if not self.master_is_kept:
            travels = full is precise and place.pins_states  # in another dtype, it does through the gradients' memory
            master = self._rest(place.states, self.own_part(precise), "states", travels)
        if self.policy.frees_params:
            self.weights = ShardedWeights(kept, self.params, self.layout, self.wire)
            full = self.weights.full
        self.full, self.kept = full, kept.flat
        return master

    def _take_values(self) -> Tensor:
        """Return the parameters' values [padded_numel] in the master's dtype, rank 0's on every rank."""
        dtype = master_dtype(self.dtype) if self.rules.trains else self.dtype
        precise = torch.empty(self.layout.padded_numel, dtype=dtype, device=self.wire.device)
        for param, slot in zip(self.params, self.layout.slots, strict=True):
            slot_view(precise, slot, param.shape).copy_(param.data)
        zero_gaps(precise, self.layout)
        broadcast(precise, self.wire.everyone, label=self.label)
        return precise

    def _rest(self, place: Place, values: Tensor, kind: Kind, pins: bool) -> Resting:
        """Return a copy of `values` at `place`."""
        name = f"{self.label}.{kind}"
        resting = self.wire.shelf.empty(place, values.numel(), values.dtype, kind=kind, name=name, pins=pins)
        resting.flat.copy_(values)
        return resting

    def pieces(self) -> list[Fragment]:
        """Return where what this rank's optimizer updates of each parameter lies in the master and in reduced sums."""
        if self.policy.optimizer is Keep.FULL:
            return [Fragment(i, 0, slot.offset, slot.numel) for i, slot in enumerate(self.layout.slots)]
        return self.layout.fragments(self.wire.axis.rank)

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

    def refresh(self) -> list[Waitable]:
        """Collective over the axis where the row says so: bring the updated master to every rank's parameters.

        Returns what is to be waited for before they are used.
        """
        if self.weights is not None:
            self.weights.shards_changed()
        arrivals: list[Waitable] = []
        link, crosses = self.wire.shelf.link, not self.master_is_kept and self._crosses_link
        values = self._on_the_way_up() if crosses else self.master
        with link.beside("up") if crosses else contextlib.nullcontext():
            if self.master_is_kept:
                pass
            elif crosses:
                self.kept.copy_(values, non_blocking=True)
                arrivals.append(link.mark())
            elif self.weights is not None:
                arrivals += self.weights.store(self.master)
            else:
                self.kept.copy_(self.master)
            if self.policy.gathers_params_after_step:
                arrivals.append(self.wire.transport.all_gather(self.full, label=self.label))
        return arrivals

    @property
    def _crosses_link(self) -> bool:
        """The weights that this rank keeps are on the device, their master is not."""
        place, link = self.rules.placement, self.wire.shelf.link
        stays = place.weights is Place.DEVICE or not self.policy.frees_params
        return stays and place.states is not Place.DEVICE and not link.host_is_device

    def _on_the_way_up(self) -> Tensor:
        """Return the master in the compute dtype, in host memory that the device can read."""
        if self.master.dtype == self.dtype and self.master_file is None:
            return self.master
        return self.gradients.lend(self.dtype).copy_(self.master)

    def take_from_params(self) -> None:
        """Make the parameters' values the master's, after somebody else has written to them."""
        if self.weights is not None:
            if not self.weights.is_whole:
                return
            self.weights.shard.copy_(self.own_part(self.full))
            self.weights.shards_changed()
        if not self.master_is_kept:
            self.master.copy_(self.kept)

    def check_params(self) -> None:
        """RuntimeError if whole parameters lie elsewhere now: an update would not reach them."""
        strayed = self._strayed() if self.weights is None else None
        if strayed is not None:
            raise RuntimeError(
                f"{self.names[strayed]} ({self.params[strayed].dtype}) has left the engine's memory ({self.dtype}), "
                "where the step updates it: its data were replaced after initialize(), for instance by model.to(dtype) "
                "or model.half(). The config's bf16 and fp16 sections choose the dtype; write values in place"
            )

    def _strayed(self) -> int | None:
        """Return the slot of the first parameter that is no view of its place in the full buffer."""
        start, itemsize = self.full.data_ptr(), self.full.element_size()
        for index, (param, slot) in enumerate(zip(self.params, self.layout.slots, strict=True)):
            if slot.numel and param.data_ptr() != start + slot.offset * itemsize:
                return index
        return None

    def view_of(self, slot: int) -> Tensor:
        """Return one parameter's place in the whole flat buffer, in its shape."""
        return slot_view(self.full, self.layout.slots[slot], self.shapes[slot])

    def keep_edit(self, slot: int) -> None:
        """Make the values in one parameter's place of the whole flat buffer this rank's shard's and master's.

        Every rank calls it, whether or not it keeps a part of the parameter.
        """
        if self.weights is not None:
            self.weights.shards_changed()
        self._store(slot, self.view_of(slot))

    def write(self, slot: int, value: Tensor) -> None:
        """Make `value`, whole, one parameter's: its master's, this rank's part of it, and the whole where it is there.

        Every rank calls it with the same value.
        """
        if self.weights is not None:
            self.weights.finish()  # or a gather under way would bring the old value
            self.weights.shards_changed()
        if self.weights is None or self.weights.is_whole:
            self.view_of(slot).copy_(value)
        self._store(slot, value.detach())

    def _store(self, slot: int, whole: Tensor) -> None:
        """Make this rank's part of one parameter's values the shard's and the master's."""
        for piece in self.pieces():
            if piece.slot == slot:
                values = whole.reshape(-1).narrow(0, piece.param_offset, piece.numel)
                self.kept.narrow(0, piece.shard_offset, piece.numel).copy_(values)
                if not self.master_is_kept:
                    self.master.narrow(0, piece.shard_offset, piece.numel).copy_(values)

    def retire(self) -> None:
        """Keep the weights alone: masters and gradients go with the engine that trained them."""
        self.gradients.drop()
        self.master, self.master_file, self.master_is_kept, self.fragments = self.kept, None, True, []

    def check_integrity(self) -> None:
        """Assert that parameters are views of the full buffer and that nothing is under way."""
        self.gradients.check_integrity()
        if self.weights is not None and not self.weights.is_whole:
            assert self.weights.num_bytes == 0, f"{self.label}: freed weights still take memory"
            assert all(tuple(param.shape) == (0,) for param in self.params), f"{self.label}: a parameter was not freed"
            return
        strayed = self._strayed()
        assert strayed is None, f"{self.names[strayed]} is no view of its group's buffer"
        for name, param, shape in zip(self.names, self.params, self.shapes, strict=True):
            assert tuple(param.shape) == shape, f"{name} has shape {tuple(param.shape)}, expected {shape}"
