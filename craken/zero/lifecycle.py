"""What a unit's forward and backward mean for its weights: gather before, free after.

    forward     |hold--------- module runs ---------let go|
    backward      |hold (a gradient reaches an output) --- gradients come --- let go (each group once its own all came)|

Each run of a unit's forward is a *passage*, which holds the unit's groups; the backward of that run holds them again in
its name. Weights that a forward reads outside of their owner (tied heads, fused losses) are held for the passage that
runs, and gathered again for its backward.

[Note: when a backward is over] A group whose every parameter has got its gradient is done with: the nodes that read a
weight have run when its gradient accumulates. Groups without gradients (frozen weights) go when the gradients of the
unit's inputs are known and all of its trainable parameters have theirs. What is left then goes when the outermost
backward ends. A forward that runs inside backward (recomputation) frees nothing at its end: the backward that waits for
it reads the weights next. In a nested backward (reentrant checkpoints) a gradient may be a part of the whole, so there
only the unit's inputs count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from craken.zero.autograd import is_in_backward, tensors_in
from craken.zero.group import ShardGroup
from craken.zero.reducer import GradientReducer
from craken.zero.residence import Residence
from craken.zero.units import Unit


class Removable(Protocol):
    """What undoes a hook."""

    def remove(self) -> None: ...


class Passage:
    """One run of a unit's forward, and the backward of it."""

    def __init__(self, unit: Unit, groups: Sequence[ShardGroup]) -> None:
        self.unit = unit
        self.groups = list(groups)  # the unit's own, then those it read besides
        self.takes_gradients = False


class Lifecycle:
    """Follows forwards and backwards through the units of one model."""

    def __init__(
        self,
        groups_of: Mapping[int, Sequence[ShardGroup]],
        residence: Residence,
        *,
        reducer: GradientReducer,
        warn: Callable[[str], None],
    ) -> None:
        """groups_of: by id of a unit's module, what it holds."""
        self._groups_of = groups_of
        self.residence, self._reducer, self._warn = residence, reducer, warn
        self.handles: list[Removable] = []  # of the hooks that call this
        self._running: list[Passage] = []
        self._outermost: int | None = None  # the graph task of the backward that runs

    def retire(self) -> None:
        """Take the hooks off the model. Weights stay as they are."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._reducer = GradientReducer([], should_reduce=bool, is_boundary=bool)  # lets go of the engine

    # --- forward ------------------------------------------------------------------------------------------------------

    def before_forward(self, unit: Unit, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Gather the unit's weights; returns the inputs under new names if their gradients are to be noticed."""
        if not self._running and not is_in_backward():
            self.residence.begin_pass(kind=torch.is_grad_enabled())
        passage = Passage(unit, self._groups_of[id(unit.module)])
        self._running.append(passage)
        self.residence.hold(passage.groups, passage)
        if not torch.is_grad_enabled() or not passage.groups:
            return None
        return self._watch_inputs(passage, inputs, kwargs)

    def _watch_inputs(
        self, passage: Passage, inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        aliases: list[Tensor] = []

        def alias(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            aliases.append(value.view_as(value))
            return aliases[-1]

        inputs, kwargs = tuple(map(alias, inputs)), {name: alias(value) for name, value in kwargs.items()}
        if not aliases:
            return None
        passage.takes_gradients = True
        register_multi_grad_hook(aliases, lambda grads: self._inputs_done(passage))
        return inputs, kwargs

    def after_forward(self, unit: Unit, outputs: Any) -> None:
        """Free the unit's weights, unless the backward that runs will read them next; called after exceptions too."""
        while self._running:
            passage = self._running.pop()
            if passage.unit is unit:
                break
            self.residence.let_go(passage.groups, passage)  # its forward raised
        else:
            return
        if not passage.groups:
            return
        if torch.is_grad_enabled() and not self._await_backward(passage, outputs):
            return
        if is_in_backward():
            self.residence.hold(passage.groups, unit)  # for the backward that had this recomputed
        self.residence.let_go(passage.groups, passage)

    def _await_backward(self, passage: Passage, outputs: Any) -> bool:
        """Have the weights gathered when a gradient reaches the outputs; False if none can be seen to."""
        reached = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
        if reached:
            register_multi_grad_hook(reached, lambda grad: self._before_backward(passage), mode="any")
            return True
        trains = any(param.requires_grad for group in passage.groups for param in group.params)
        if outputs is None or not (trains or passage.takes_gradients):
            return True
        self._warn(
            f"{passage.unit.name or 'the model'}: no tensor that carries a gradient was found in what its forward "
            "returned, so its weights stay whole until the backward ends; return tensors in tuples, lists, dicts or "
            "dataclasses to save that memory"
        )
        return False

    def is_running(self) -> bool:
        """Say whether a unit's forward runs."""
        return bool(self._running)

    def read_in_forward(self, group: ShardGroup) -> None:
        """Have a group whole for the forward that runs now, and for its backward: a weight of it is being read."""
        passage = self._running[-1]
        if group not in passage.groups:
            passage.groups.append(group)
        elif group.weights is None or group.weights.is_whole:
            return
        self.residence.hold([group], passage)

    # --- backward -----------------------------------------------------------------------------------------------------

    def _before_backward(self, passage: Passage) -> None:
        if self._outermost is None or not self._reducer.is_expecting:
            self._outermost = torch._C._current_graph_task_id()
            self._reducer.expect_backward()
        self.residence.hold(passage.groups, passage)

    def gradients_came(self, group: ShardGroup) -> None:
        """Free a group whose every parameter has got its gradient (see [Note: when a backward is over])."""
        if group.weights is not None and self._outermost in (None, torch._C._current_graph_task_id()):
            self.residence.release(group)

    def _inputs_done(self, passage: Passage) -> None:
        if all(self._reducer.is_complete(group) for group in passage.groups):
            self.residence.let_go(passage.groups, passage)
            self.residence.let_go(passage.groups, passage.unit)

    def backward_ended(self) -> None:
        """Free whatever is still whole; called at the end of the outermost backward."""
        self._outermost = None
        self.residence.release_all()
