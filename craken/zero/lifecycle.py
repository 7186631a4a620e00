"""What a unit's forward and backward mean for its weights: gather before, free after.

    forward     |hold--------- module runs ---------let go|
    backward      |hold (a gradient reaches an output) --- gradients come --- the groups close: let go|

Each run of a unit's forward is a *passage* (passages.py), which holds the unit's groups; the backward of that run holds
them again. Weights that a forward reads outside of their owner (tied heads, fused losses) are held for the passage that
runs, and gathered again for its backward. Where outputs are weights themselves, or views of them, the passage around
this one reads them too; what leaves the outermost forward is a copy.

[Note: when a backward is over] When groups close is decided by the order of modules, the same on all ranks
(residence.py says why). The memory of a group goes at once when its every parameter has got its gradient: the nodes
that read a weight have run by then. Where a gradient is missing it stays until the outermost backward ends. A forward
that runs inside backward (recomputation) leaves its weights for the backward that waits for it. In a nested backward
(reentrant checkpoints) a gradient may be a part of the whole, so there only the unit's inputs count.

[Note: graphs of gradients] A backward with create_graph leaves a graph that reads weights again, from places where no
unit's outputs are passed: what it used stays whole until the step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from craken.zero.autograd import is_in_backward, map_tensors, tensors_in
from craken.zero.group import ShardGroup
from craken.zero.passages import Passage, Uses
from craken.zero.plans.units import Unit
from craken.zero.reducer import GradientReducer
from craken.zero.residence import BACKWARD, UNTIL_STEP, Residence


class Removable(Protocol):
    """What undoes a hook."""

    def remove(self) -> None: ...


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
        self._depth = 0  # of the stack where the outermost of them began
        self._uses = Uses()
        self._outermost: int | None = None  # the graph task of the backward that runs

    def remove_hooks(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def retire(self) -> None:
        """Take the hooks off the model for good. Weights stay as they are."""
        self.remove_hooks()
        self._reducer = GradientReducer([])  # lets go of what is held to train

    # --- forward ------------------------------------------------------------------------------------------------------

    def before_forward(self, unit: Unit, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Gather the unit's weights; returns the inputs under new names if their gradients are to be noticed."""
        if is_in_backward():
            self._reducer.send_closed()
        else:
            self._begin_pass()
        for outer in self._running:
            outer.enclose()
        passage = Passage(unit, self._groups_of[id(unit.module)])
        self._running.append(passage)
        self.residence.hold(passage.groups, passage)
        if not torch.is_grad_enabled() or not passage.groups:
            return None
        return self._watch_inputs(passage, inputs, kwargs)

    def _begin_pass(self) -> None:
        depth = _stack_depth()
        if self._running and depth <= self._depth:
            self._unwind(self._running[0])  # an interrupt ended that forward past all hooks
        if not self._running:
            self._depth = depth
            self._reducer.abandon_backward()  # a backward that raised never said that it ended
            self._uses.forget_awaited()
            self.residence.begin_pass(kind=torch.is_grad_enabled())

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
        self._call_when_known(aliases, lambda *grads: self._close(self._uses.end(passage.uses)))
        return inputs, kwargs

    @staticmethod
    def _call_when_known(aliases: Sequence[Tensor], call: Callable[..., None]) -> None:
        """Have `call` called in a backward, once the gradients of all `aliases` that get one are known."""
        if len(aliases) == 1:
            # the hook for many refers to the graph it hangs on: unused losses would keep their activations for a while
            aliases[0].register_hook(call)  # type: ignore[no-untyped-call]
        else:
            register_multi_grad_hook(aliases, call)

    def after_forward(self, unit: Unit, outputs: Any) -> Any:
        """Free the unit's weights, unless the backward that runs will read them next; called after exceptions too.

        Returns what to return in place of `outputs`, or None.
        """
        passage = next((running for running in reversed(self._running) if running.unit is unit), None)
        if passage is None:
            return None
        self._unwind(passage, keep=True)
        has_raised = outputs is None and sys.exc_info()[0] is not None
        if passage.groups and not has_raised:
            outputs = self._pass_on_aliases(passage, outputs)
            if torch.is_grad_enabled():
                self._await_backward(passage, outputs)
        if is_in_backward():
            self.residence.hold(passage.groups, BACKWARD)  # which had this recomputed
        self.residence.let_go(passage.groups, passage)
        return None if has_raised else outputs

    def _unwind(self, passage: Passage, *, keep: bool = False) -> None:
        """Take passages off the stack, down to `passage`: inner ones raised. With `keep` it still holds its groups."""
        while True:
            last = self._running.pop()
            if last is not passage or not keep:
                self.residence.let_go(last.groups, last)
            if last is passage:
                return

    def _pass_on_aliases(self, passage: Passage, outputs: Any) -> Any:
        """Let the passage around this one read the groups whose memory `outputs` show; copy where there is none."""
        memory = {group.full.untyped_storage().data_ptr(): group for group in passage.groups}
        shown = {id(tensor): group for tensor in tensors_in(outputs) if (group := memory.get(_memory_of(tensor)))}
        if not shown:
            return outputs
        if self._running:
            for group in shown.values():
                self.read_in_forward(group)
            return outputs
        return map_tensors(outputs, lambda tensor: tensor.clone() if id(tensor) in shown else tensor)

    def _await_backward(self, passage: Passage, outputs: Any) -> None:
        """Have the weights gathered when a gradient reaches the outputs; keep them if none can be seen to."""
        reached = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
        if reached:
            register_multi_grad_hook(reached, lambda grad: self._before_backward(passage), mode="any")
            if not is_in_backward():
                self._uses.await_backward(passage)
            return
        trains = any(param.requires_grad for group in passage.groups for param in group.params)
        if trains or passage.takes_gradients:
            self._keep_until_step(
                passage.groups,
                f"{passage.unit.name or 'the model'}: no tensor that carries a gradient was found in what its forward "
                "returned, so its weights stay whole until the step; return tensors in tuples, lists, dicts, "
                "dataclasses or attributes of objects to save that memory",
            )

    def _keep_until_step(self, groups: Iterable[ShardGroup], why: str) -> None:
        self.residence.hold(groups, UNTIL_STEP)
        self._warn(why)

    def is_running(self) -> bool:
        """Say whether a unit's forward runs."""
        return bool(self._running)

    def read_in_forward(self, group: ShardGroup) -> None:
        """Have a group whole for the forward that runs now, and for its backward: a weight of it is being read."""
        passage = self._running[-1]
        if group.weights is not None and passage.read(group):
            self.residence.hold([group], passage)

    # --- backward -----------------------------------------------------------------------------------------------------

    def _before_backward(self, passage: Passage) -> None:
        if self._outermost is None or not self._reducer.is_expecting:
            self._reducer.expect_backward()
            self._outermost = torch._C._current_graph_task_id()
        self._close(self._uses.end_innermost(passage))
        self._reducer.send_closed()
        self._uses.begin(passage)
        self.residence.hold(passage.groups, BACKWARD)
        if torch.is_grad_enabled():
            self._keep_until_step(
                passage.groups,
                "a backward with create_graph: weights that it uses stay whole until the step, for its own gradient",
            )

    def closes_next(self, group: ShardGroup) -> bool:
        """Say whether the backward of all uses of `group` is sure to be over at the next gather."""
        return self._uses.closes_next(group)

    def gradients_came(self, group: ShardGroup) -> None:
        """Free a group whose every parameter has got its gradient (see [Note: when a backward is over])."""
        is_whole_gradient = self._outermost in (None, torch._C._current_graph_task_id())
        if group.weights is not None and is_whole_gradient and self._uses.closes_next(group):
            self.residence.spare(group)

    def _close(self, closed: Sequence[ShardGroup]) -> None:
        all_came = not self._reducer.is_running or all(self._reducer.is_complete(group) for group in closed)
        for group in closed:
            self._reducer.close(group)
        self.residence.let_go(closed, BACKWARD, lingers=not all_came)

    def backward_ended(self) -> None:
        """Free whatever no forward holds; called at the end of the outermost backward."""
        self._outermost = None
        self._uses.end_all()
        if not self._running:
            self._uses.forget_awaited()
        self.residence.sweep(BACKWARD)


def _stack_depth() -> int:
    frame, depth = sys._getframe(), 0
    while (outer := frame.f_back) is not None:
        frame, depth = outer, depth + 1
    return depth


def _memory_of(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and other tensors without a storage
        return 0
