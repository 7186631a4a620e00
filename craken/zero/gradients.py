"""The gradients of one shard group: taken from autograd, summed over ranks and micro-batches, kept until the step.

    accumulate    autograd's tensor -> `pending` (scratch, full)
    start_reduce  pending -> shards: a reduce-scatter leaves; with the optimizer FULL an all-gather follows it
    finish        the sum is in `reduced` (this rank's shard, or the full buffer), pending is free again
    spend         a step has taken the sum: users may read it until the next forward, backward or save
    replicas      where shards are repeated: at the boundary, the sum of the shard's sums on all ranks that hold it

Buffers have the layout of the group's flat buffer. Sums are over ranks and micro-batches; the division by their number
happens once, in the optimizer's step.

Where the optimizer's states have left the device, each backward's sum follows them while the backward goes on
(host_sum.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from craken.comm import Pending, start_sum
from craken.zero.flat import own_part, slot_views, zero_gaps
from craken.zero.host_sum import HostSum
from craken.zero.memory.placement import Place
from craken.zero.memory.room import Room, room_for
from craken.zero.norms import piece_norms
from craken.zero.plans.layout import GroupLayout
from craken.zero.rules import GroupRules, Wire


class GroupGradients:
    """Flat gradient buffers, there while something is in them."""

    def __init__(
        self,
        label: str,
        shapes: Sequence[tuple[int, ...]],
        layout: GroupLayout,
        dtype: torch.dtype,
        rules: GroupRules,
        wire: Wire,
    ) -> None:
        """dtype: of the weights; `rules` says what gradients are kept and sent in."""
        self.label, self.shapes, self.layout = label, list(shapes), layout
        self.dtype, self.rules, self.wire = dtype, rules, wire
        self._pending: Tensor | None = None
        self._places: list[Tensor] = []  # each parameter's, in pending; made when the first is needed
        self._filled = [False] * len(shapes)
        self.touched = [False] * len(shapes)
        self._travelling: Tensor | None = None
        self._work: Pending | None = None
        self._reduced_shard: Tensor | None = None
        self._retained: Tensor | None = None
        # what a step took, like `reduced`, and what divides it to give the mean gradient, clipped
        self.taken: tuple[Tensor, float] | None = None
        self.has_reduced = self._has_total = False
        link, place = wire.shelf.link, rules.placement
        self.leaves_device = place.states is not Place.DEVICE and not link.host_is_device
        self._host = HostSum(link, layout.shard_numel, pins=place.pins_states)
        # where replicas add theirs, a sum over the axis stays until they have
        self._sends_each_sum = self.leaves_device and wire.replication is None
        self._total: Tensor | None = None
        self._room = _room_for_sum(self)

    def begin_accumulating(self) -> None:
        """Hold gradients over several micro-batches from now on, in fp32 unless the config names a dtype.

        For jobs that accumulate although their config says otherwise. Every rank does it before the same micro-batch.
        """
        if self.rules.accumulates:
            return
        self.rules = self.rules.accumulating()
        self._room = _room_for_sum(self)
        if self._pending is not None:
            self._pending, self._places = self._pending.to(self._pending_dtype), []
        if self._retained is not None:
            self._retained = self._retained.to(self.accumulate_dtype)
        if self.leaves_device and (self.has_reduced if self._sends_each_sum else self._has_total):
            self._host.convert(self.accumulate_dtype)
        if self._total is not None:
            self._total = self._total.to(self.accumulate_dtype)
        if self._reduced_shard is not None:
            shard, self._reduced_shard = self._reduced_shard.to(self.accumulate_dtype), None
            if self.rules.retains_full_grads:
                self._retained = self._scratch()
                self._own_part(self._retained).copy_(shard)
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
        if _can_adopt(self, grad, factor):
            self._pending = grad.view(-1)
        else:
            self._add(slot, grad if grad.layout is torch.strided else grad.to_dense(), factor)
        self._filled[slot] = self.touched[slot] = True

    def _add(self, slot: int, grad: Tensor, factor: float) -> None:
        if not self._places:
            if self._pending is None:
                self._pending = self._scratch()
            self._places = slot_views(self._pending, self.layout, self.shapes)
        place = self._places[slot]
        if self._filled[slot]:
            place.add_(grad, alpha=factor)
        elif factor == 1.0:
            place.copy_(grad)
        else:
            torch.mul(grad, factor, out=place) if grad.dtype == place.dtype else place.copy_(grad).mul_(factor)

    def start_reduce(self) -> None:
        """Collective over the axis: send what is pending (zeros where nothing came) on its way to the shards."""
        assert self._work is None, f"{self.label} is being reduced already"
        pending = self._completed_pending()
        own = self._own_part(pending)
        sums_in_place = self.rules.retains_full_grads
        adds = self._has_sum and not sums_in_place
        out = own if sums_in_place else self._shard_for_sum()
        self._travelling = pending
        self._work = self.wire.transport.reduce_scatter(
            pending.to(self.reduce_dtype), own, out, add=adds, label=self.label
        )

    def finish_sum(self) -> None:
        """Wait for the shard's sum; with the optimizer FULL, start gathering the sums of the other ranks."""
        assert self._work is not None, f"{self.label} is not being reduced"
        assert self._travelling is not None
        self._host.wait()
        self._work.wait()
        self._work = None
        if self.rules.policy.gathers_grads:
            self._work = self.wire.transport.all_gather(self._travelling, label=f"{self.label} (gradients)")
        else:
            self._settle()

    def finish_gather(self) -> None:
        """Wait until this rank holds what the optimizer needs."""
        if self._work is None:
            return
        self._work.wait()
        self._work = None
        if self._travelling is not None:
            self._settle()
        else:
            self._settle_total()

    @property
    def _has_sum(self) -> bool:
        """There is a sum over the axis to which the next one is added."""
        return self.has_reduced if self.wire.replication is None else self._reduced_shard is not None

    @property
    def awaits_replicas(self) -> bool:
        """There is a sum over the shard axis to which other replicas have not added theirs."""
        return self.wire.replication is not None and self._reduced_shard is not None and self._work is None

    def start_over_replicas(self) -> None:
        """Collective over the replicate axis: start adding up the shard's sums; `finish_gather` completes it."""
        assert self.wire.replication is not None
        assert self._reduced_shard is not None
        label = f"{self.label} (replicas)"
        self._work = start_sum(self._reduced_shard, self.wire.replication.replicas, label=label)

    def _settle_total(self) -> None:
        shard, self._reduced_shard = self._reduced_shard, None
        assert shard is not None
        if self.leaves_device:
            self._host.send(shard, adds=self._has_total)
        else:
            self._total = shard if self._total is None else self._total.add_(shard)
        self._has_total = True

    def _settle(self) -> None:
        pending, self._travelling = self._travelling, None
        assert pending is not None
        if self._sends_each_sum:
            shard, self._reduced_shard = self._reduced_shard, None
            if shard is None:
                self._host.send(self._own_part(pending), adds=self.has_reduced)
            else:
                self._host.send(shard, adds=False)
        elif self._retained is not None:
            self._counted_part(self._retained).add_(self._counted_part(pending))
        elif self.rules.retains_full_grads:
            self._retained = pending
        self.has_reduced = True

    def lend(self, dtype: torch.dtype) -> Tensor:
        """Return host memory [shard_numel] that the device can read, until the next sum leaves for the host."""
        return self._host.lend(dtype, self.accumulate_dtype)

    def _counted_part(self, full: Tensor) -> Tensor:
        """Return the part of a summed full buffer that is valid: all of it after an all-gather, else the own slice."""
        return full if self.rules.policy.gathers_grads else self._own_part(full)

    def _scratch(self) -> Tensor:
        return torch.empty(self.layout.padded_numel, dtype=self._pending_dtype, device=self.wire.device)

    def _completed_pending(self) -> Tensor:
        pending = self._scratch() if self._pending is None else self._pending
        self._pending, self._places = None, []
        for filled, slot in zip(self._filled, self.layout.slots, strict=True):
            if not filled:
                pending[slot.offset : slot.offset + slot.numel].zero_()
        zero_gaps(pending, self.layout)
        self._filled = [False] * len(self.shapes)
        if self.rules.predivide != 1.0:
            pending.mul_(1.0 / self.rules.predivide)
        return pending

    def _shard_for_sum(self) -> Tensor:
        if self._reduced_shard is None:
            self._reduced_shard = self._memory_for_sum()
            if self._sends_each_sum and self.has_reduced:
                self._host.bring(self._reduced_shard)
        return self._reduced_shard

    def _memory_for_sum(self) -> Tensor:
        """Return undefined values [shard_numel] in the accumulate dtype."""
        if self._room is None:
            return torch.empty(self.layout.shard_numel, dtype=self.accumulate_dtype, device=self.wire.device)
        self._room.take()
        return self._room.flat

    @property
    def reduced(self) -> Tensor:
        """The summed gradient in the accumulate dtype: [shard_numel], or [padded_numel] with the optimizer FULL."""
        assert self.has_reduced, f"{self.label} has no reduced gradient"
        if self._is_on_host:
            return self._host.values
        if self._retained is not None:
            return self._counted_part(self._retained)
        shard = self._reduced_shard if self._total is None else self._total
        assert shard is not None
        return shard

    @property
    def _is_on_host(self) -> bool:
        return self.leaves_device and (self._sends_each_sum or self._has_total)

    def own_reduced(self) -> Tensor:
        """Return the part [shard_numel] of the summed gradient that counts as this rank's, for norms."""
        return self._own_part(self.reduced) if self.rules.policy.gathers_grads else self.reduced

    def norms(self) -> Sequence[Tensor]:
        """Return the L2 norms of the pieces of `own_reduced`, on the device."""
        return self._host.norms() if self._is_on_host else piece_norms(self.own_reduced())

    def sum_changed(self) -> None:
        """Take note that somebody has written to `reduced`."""
        if self._is_on_host:
            self._host.changed()

    @property
    def on_device(self) -> list[Tensor]:
        """The buffers that lie on the device now."""
        taken = None if self.taken is None else self.taken[0]
        held = (self._pending, self._travelling, self._retained, self._reduced_shard, self._total, taken)
        return [buffer for buffer in held if buffer is not None]

    @property
    def on_host(self) -> list[Tensor]:
        """The buffers that lie in the host's memory and not on the device."""
        return self._host.memory

    @property
    def has_any(self) -> bool:
        """Gradients have come since the last step, reduced or not."""
        return self.has_pending or self.has_reduced or any(self.touched)

    def drop(self) -> None:
        """Forget all gradients and give their memory back: the next forward's activations can use it."""
        self._forget()
        if self._room is not None:
            self._room.give_back()

    def spend(self, divisor: float) -> None:
        """Forget all gradients; the sum that a step has taken stays as `taken`, unless its memory was lent."""
        taken = (self.reduced, divisor) if self.has_reduced and not self._is_on_host else None
        self._forget()
        self.taken = taken

    def _forget(self) -> None:
        self._pending = self._retained = self._reduced_shard = self._total = self.taken = None
        self._places = []
        self._filled = [False] * len(self.shapes)
        self.touched = [False] * len(self.shapes)
        self.has_reduced = self._has_total = False

    def _own_part(self, flat: Tensor) -> Tensor:
        return own_part(flat, self.layout, self.wire.axis.rank)

    def check_integrity(self) -> None:
        """Assert that nothing is under way."""
        assert self._work is None, f"{self.label}: a collective is under way"
        assert self._travelling is None, f"{self.label}: a gradient buffer was forgotten"


def kept_as(gradients: GroupGradients) -> str:
    """Say in which sizes, dtypes and places sums are kept: what `state_of` returns fits where this is the same."""
    rules, layout, wire = gradients.rules, gradients.layout, gradients.wire
    numels = f"{layout.padded_numel}/{layout.shard_numel} for rank {wire.axis.rank} x {wire.num_replicas}"
    dtypes = f"{gradients.accumulate_dtype}, {gradients._pending_dtype}"
    places = f"{gradients.leaves_device}, {rules.retains_full_grads}"
    return f"{gradients.label}: {numels}, {dtypes}, {rules.predivide}, {places}"


def state_of(gradients: GroupGradients) -> dict[str, Any]:
    """Return what has come since the last step: flags, and tensors on loan."""
    g, shard = gradients, gradients._reduced_shard
    if shard is not None and g._room is not None and shard.untyped_storage().resizable():
        shard = shard.clone()  # a small room shrinks, which storage seen through numpy does not
    on_host = g._host.values if g._is_on_host and g.has_reduced else None
    flags = {"filled": [*g._filled], "touched": [*g.touched], "reduced": g.has_reduced, "has_total": g._has_total}
    held = {"pending": g._pending, "retained": g._retained, "shard": shard, "total": g._total}
    return {**flags, **held, "host": on_host}


def load_state(gradients: GroupGradients, state: dict[str, Any]) -> None:
    """Take back what `state_of` returned; `kept_as` says the same as then, and nothing has come since."""
    g, device = gradients, gradients.wire.device
    held = {name: state[name] for name in ("pending", "retained", "total") if state[name] is not None}
    moved = {name: tensor.to(device, copy=True) for name, tensor in held.items()}
    g._pending, g._retained, g._total = map(moved.get, ("pending", "retained", "total"))
    if state["shard"] is not None:
        g._reduced_shard = g._memory_for_sum().copy_(state["shard"])
    if state["host"] is not None:
        g._host.fill(state["host"])
    g._filled, g.touched = state["filled"], state["touched"]
    g.has_reduced, g._has_total = state["reduced"], state["has_total"]


def _can_adopt(gradients: GroupGradients, grad: Tensor, factor: float) -> bool:
    """Say whether autograd's tensor can itself be the pending buffer: one parameter, no padding, no conversion.

    The sum is written into it, so nobody else may hold its memory: two gradients can be views of one storage.
    """
    return (
        len(gradients.shapes) == 1
        and not gradients.has_pending
        and factor == 1.0
        and grad.layout is torch.strided
        and grad.is_contiguous()
        and grad.dtype == gradients._pending_dtype
        and grad.numel() == gradients.layout.padded_numel
        and _is_sole_owner(grad)
    )


def _is_sole_owner(tensor: Tensor) -> bool:
    """Say whether no other tensor shares this one's storage; needs every other alias of `tensor` itself to be gone."""
    return _storage_uses(tensor) == _storage_uses(torch.empty(1))


def _storage_uses(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _room_for_sum(gradients: GroupGradients) -> Room | None:
    """Return the host memory that a group's sums are kept in, empty for now; None where they lie elsewhere.

    It is outside of the heap and there before the first backward. A sum stays until the step: amid buffers that come
    and go it would cut up what they leave, and the heap then grows by a group's buffer for every other group. With
    weights that stay, sums take the place of activations that are freed before them.
    """
    rules, wire = gradients.rules, gradients.wire
    is_on_host = wire.device.type == "cpu" and not gradients.leaves_device and wire.replication is None
    if not is_on_host or not rules.trains or not rules.policy.frees_params:
        return None
    room = room_for(gradients.layout.shard_numel, gradients.accumulate_dtype, wire.device)
    room.give_back()
    return room
