"""The object that `initialize` returns: forward, backward and step of a sharded model.

    loss = engine(batch)        the user's module, inputs cast if asked
    engine.backward(loss)       autograd runs; hooks hand gradients to shard groups, which reduce them as they complete
    engine.step()               at a boundary: agree, clip, update, refresh parameters, advance schedule and loss scale

`loss.backward()` works too: gradients are then divided by the accumulation count on their way in, and in fp16 the loss
must have gone through `engine.scale(loss)`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from craken.comm import phase
from craken.engine.accumulation import Accumulation
from craken.engine.build import Parts, ceilings_of
from craken.engine.model import cast_inputs
from craken.engine.progress import Progress
from craken.engine.standing import Standing
from craken.engine.timers import PhaseTimers
from craken.log import warn_once
from craken.precision import dtype_from_name
from craken.zero import (
    GradientReducer,
    GrowthTrimmer,
    Lifecycle,
    Occasion,
    ParameterOffload,
    Removable,
    Residence,
    ShardedOptimizer,
    ShardedStep,
    ShardGroup,
    StepResult,
    hold_states,
    is_in_backward,
    load_gradient_state,
    register,
    register_whole,
    release_states,
    return_freed_memory,
    watch_gradients,
    watch_loading,
    watch_outputs,
)
from craken.zero.parking import Parking

TRIM_EVERY = 32  # steps


class _Running(NamedTuple):
    """A call of `backward` under way: whose loss scale and (unless the caller divides) accumulation count were used."""

    engine: Engine
    divides: bool


@dataclass
class _Record:
    """What the engine remembers from step to step. A plain object: to set a module's attribute costs 3 us."""

    grad_norm: float | None = None
    was_applied: bool = False
    was_scaled: bool = False  # the loss went through `scale` since the last step
    num_backwards: int = 0  # at the last step


class Engine(nn.Module):
    """A user's module whose gradients, optimizer states and parameters are sharded over ranks."""

    # in this process, the innermost last; the graph may go through parameters of several engines
    _running: ClassVar[list[_Running]] = []

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.module = parts.module
        self.parts = parts
        self.device, self.groups = parts.device, parts.groups
        self.lr_scheduler, self.training_dataloader = parts.scheduler, parts.loader
        self.loss_scaler = parts.loss_scale
        self.optimizer: ShardedOptimizer | ParameterOffload | None = None
        self.accumulation = Accumulation(parts.stride.batch.accumulation_steps)
        self.global_steps = self.skipped_steps = 0
        self._record = _Record()
        self._trimmer = GrowthTrimmer()
        self._syncs = True
        self.parking = Parking(parts.shelf.link)
        self.standing = Standing(self.parking)
        self._timers = PhaseTimers(is_on=parts.config.wall_clock_breakdown)
        self._progress = Progress(parts.config.steps_per_print, parts.monitor, self._timers)
        self._reducer = GradientReducer(parts.groups, self._occasion)
        self._stepper: ShardedStep | None = None
        if parts.binding is not None:
            self._stepper = ShardedStep(parts.binding, parts.groups, self._reducer, parts.stepping, parts.swap)
            self.optimizer = ShardedOptimizer(parts.binding.optimizer, parts.loss_scale)
        self._handles: list[Removable] = [*watch_gradients(parts.groups, self._reducer)]
        self._lifecycle = self._bring_weights(parts)
        hold_states(self.module, parts.groups, parts.binding, self._grad_divisor)
        self._handles.append(watch_loading(self.module, self._weights_were_loaded))
        # parameters hold their groups: an engine that is dropped takes masters and gradients along
        weakref.finalize(self, _let_go, self._handles, self.groups).atexit = False
        self._autocast_dtype = _autocast_dtype(parts)

    def _bring_weights(self, parts: Parts) -> Lifecycle | None:
        """Have weights that are kept as shards gathered for each use; None where all are kept whole."""
        if not parts.layers.units:
            return None
        groups = [*parts.groups, *parts.layers.frozen]
        freed = [group for group in groups if group.weights is not None]
        residence = Residence(freed, ceilings_of(parts.config, parts.layers))
        lifecycle = Lifecycle(parts.layers.groups_of, residence, reducer=self._reducer, warn=warn_once)
        register(groups, parts.axis, residence, lifecycle)
        grouped = {id(param) for group in groups for param in group.params}
        register_whole((param for param in parts.module.parameters() if id(param) not in grouped), parts.axis)
        offload = ParameterOffload(parts.module, parts.layers.units if freed else [], freed, lifecycle)
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.parameter_offload = offload
        else:
            self.optimizer = offload  # where clients look for it, without an optimizer
        if not freed:
            return None
        self._reducer.observer = lifecycle
        return lifecycle

    def __getattr__(self, name: str) -> Any:
        """Fall through to the user's module for anything the engine does not have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":  # not set yet: no module to ask
                raise
            return getattr(super().__getattr__("module"), name)

    # --- forward and backward -----------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the user's module; returns what it returns."""
        self.standing.check("forward")
        if not is_in_backward():
            self._reducer.abandon_backward()  # a backward that raised never said that it ended
        if self.parts.config.fp16.auto_cast and self.parts.precision.compute is not None:
            inputs, kwargs = cast_inputs((inputs, kwargs), self.parts.precision.compute)
        with self._timers.phase("forward"), self._autocast(), phase("engine::forward"):
            outputs = self.module(*inputs, **kwargs)
        if torch.is_grad_enabled() and self.groups:
            watch_outputs(outputs, self._reducer)
        return outputs

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True, **options: Any) -> Tensor:
        """Run backward from a scalar `loss`, scaled by the loss scale and divided by the accumulation count.

        Collective where gradients are reduced in this micro-batch. `scale_wrt_gas=False` leaves the division to the
        caller. Returns the loss as it was divided, without the loss scale.
        """
        self._check_loss(loss)
        self.parking.check_empty("backward()")
        steps = self.accumulation.steps
        divided = loss / steps if scale_wrt_gas and steps > 1 else loss
        if self._lifecycle is not None and self.device.type == "cpu":
            self._trimmer.look()  # a step's peak is near, and weights were not freed to make room for holes
        Engine._running.append(_Running(self, scale_wrt_gas))
        try:
            with self._timers.phase("backward"), phase("engine::backward"), self._reducer.backward():
                torch.autograd.backward(self._scaled(divided), retain_graph=retain_graph, **options)
        finally:
            Engine._running.pop()
        self._progress.note_loss(loss)
        return divided

    def scale(self, loss: Tensor) -> Tensor:
        """Return `loss` times the loss scale, for a `loss.backward()` of the user's own."""
        self._check_loss(loss)
        self._record.was_scaled = True
        return self._scaled(loss)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scaler.value == 1.0 else loss.float() * self.loss_scaler.value

    def _check_loss(self, loss: Any) -> None:
        if not isinstance(loss, Tensor):
            raise ValueError(f"backward(loss): expected a scalar tensor, got a {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"backward(loss): expected one number, got shape {tuple(loss.shape)}; use loss.mean()")
        if not loss.requires_grad:
            raise ValueError(
                "backward(loss): this loss has no graph; compute it from engine(...) without torch.no_grad(), from "
                "parameters that require grad"
            )

    def _grad_factor(self) -> float:
        """Return what a gradient that arrives now lacks: the loss scale and the division by the accumulation count."""
        if Engine._running:
            return 1.0 if Engine._running[-1].engine is self else self._factor_from(Engine._running[-1])
        if self.loss_scaler.value != 1.0 and not self._record.was_scaled:
            raise RuntimeError(
                f"loss.backward() with a loss scale of {self.loss_scaler.value:g}: expected engine.scale(loss)"
                ".backward() or engine.backward(loss); without the scale, fp16 gradients would be wrong"
            )
        return 1.0 / self.accumulation.steps

    def _factor_from(self, other: _Running) -> float:
        """Return the factor for gradients of this engine's parameters in another engine's backward."""
        scale = self.loss_scaler.value / other.engine.loss_scaler.value
        return scale * other.engine.accumulation.steps / self.accumulation.steps if other.divides else scale

    def _occasion(self) -> Occasion:
        is_boundary = self.accumulation.is_boundary
        reduces = self._syncs and (is_boundary or self._reduces_every_backward)
        return Occasion(reduces=reduces, ends_step=is_boundary, grad_factor=self._grad_factor)

    @property
    def _reduces_every_backward(self) -> bool:
        return bool(self.groups) and self.groups[0].policy.reduces_every_backward

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast_dtype)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep the gradients of backward calls inside on this rank; stages 0 and 1 only."""
        if self._reduces_every_backward:
            raise RuntimeError(
                "no_sync() at a stage that shards gradients: each backward must reduce them, there is no room to keep "
                "them whole. Use stage 0 or 1, or drop no_sync()"
            )
        if not self._syncs:
            raise RuntimeError("no_sync() inside of no_sync(); leave the outer one first")
        self._begin_accumulating()
        self._syncs = False
        try:
            yield
        finally:
            self._syncs = True

    # --- step ---------------------------------------------------------------------------------------------------------

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """End a micro-batch; at the boundary, update the parameters. Collective over the ranks then."""
        if self._stepper is None:
            raise RuntimeError(
                "step() on an engine without an optimizer: give initialize() one, or name it in the config"
            )
        if not self._syncs:
            raise RuntimeError("step() inside of no_sync(): leave the block first")
        self.standing.check("step()")
        self._reducer.abandon_backward()
        if self._reducer.num_backwards == self._record.num_backwards:
            raise RuntimeError(
                "step() before backward(): no gradient has come since the last one; call engine.backward(loss) first "
                "(after a backward that raised: run the forward again)"
            )
        self._record.num_backwards, self._record.was_applied = self._reducer.num_backwards, False
        is_boundary = self.accumulation.is_boundary
        self.accumulation.advance()
        if not is_boundary:
            return
        with self._timers.phase("step"), phase("engine::step"):
            result = self._take_step(self._stepper)
        self._after_step(result, lr_kwargs)

    def _grad_divisor(self) -> float:
        """Return what a sum of gradients is divided by to give the mean gradient of the loss as it was."""
        return self.parts.stride.divisor * self.loss_scaler.value

    def _take_step(self, stepper: ShardedStep) -> StepResult:
        stride = self.parts.stride
        divisor, skips_nonfinite = self._grad_divisor(), stride.skips_nonfinite
        result = stepper.step(divisor=divisor, max_norm=stride.max_norm, skip_nonfinite=skips_nonfinite)
        self._reducer.agree_on_order()
        self.renew_weights()
        return result

    def _after_step(self, result: StepResult, lr_kwargs: dict[str, Any] | None) -> None:
        record = self._record
        record.grad_norm, record.was_applied, record.was_scaled = result.grad_norm, result.was_applied, False
        self.global_steps += 1
        scale_before = self.loss_scaler.value
        self.loss_scaler.update(has_overflow=not result.is_finite)
        if isinstance(self.optimizer, ShardedOptimizer):
            self.optimizer.note_step(was_applied=result.was_applied)
        if result.was_applied:
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**(lr_kwargs or {}))
        else:
            self.skipped_steps += 1
            self._progress.note_skip(self.global_steps, scale_before, self.loss_scaler.value)
        self._progress.note_step(self)
        if _is_time_to_trim(self.global_steps):
            return_freed_memory()

    # --- what users ask -----------------------------------------------------------------------------------------------

    def get_global_grad_norm(self) -> float | None:
        """Return the last step's L2 norm of the mean gradient over all ranks, before clipping; None before a step."""
        return self._record.grad_norm

    def get_lr(self) -> list[float]:
        """Return the learning rate of each optimizer group."""
        groups = self.optimizer.param_groups if isinstance(self.optimizer, ShardedOptimizer) else []
        return [float(group["lr"]) for group in groups]

    def is_gradient_accumulation_boundary(self) -> bool:
        """Say whether the micro-batch under way is the last of its step."""
        return self.accumulation.is_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether the micro-batch under way is the last of its step; from now on only this flag counts."""
        self.accumulation.flag = bool(is_boundary)
        if not is_boundary:
            self._begin_accumulating()

    def _begin_accumulating(self) -> None:
        for group in self.groups:
            group.gradients.begin_accumulating()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop `.grad` of parameters the engine does not manage.

        Gradients in shard groups stay: `step` drops them, and clients call `zero_grad` between micro-batches. To forget
        what was accumulated, call `discard_gradients`.
        """
        self.module.zero_grad(set_to_none=set_to_none)

    def discard_gradients(self) -> None:
        """Forget every gradient since the last step, for instance after a micro-batch that ran out of memory."""
        self._reducer.abandon_backward()
        for group in self.groups:
            group.gradients.drop()
        self._record.num_backwards = self._reducer.num_backwards

    def resume_step(self, gradients: dict[str, Any], in_step: int) -> None:
        """Go on in a step after `in_step` micro-batches, whose `gradient_state` on this rank is given."""
        load_gradient_state(self.groups, gradients)
        self.accumulation.in_step = in_step
        self._record.num_backwards -= 1  # there was a backward since the last step

    def _weights_were_loaded(self) -> None:
        for group in (*self.groups, *self.parts.layers.frozen):
            group.take_from_params()

    def renew_weights(self) -> None:
        """Collective: drop whole copies of weights whose shards have changed."""
        if self._lifecycle is not None:
            self._lifecycle.residence.renew()

    def destroy(self) -> None:
        """Take all hooks off the module; it can be given to `initialize` again.

        Weights that are kept as shards stay so: read them inside of `GatheredParameters`. Masters and states go.
        """
        self._reducer.abandon_backward()
        if self._lifecycle is not None:
            self._lifecycle.retire()
            self.standing.end()
        _let_go(self._handles, self.groups)

    def check_integrity(self) -> None:
        """Assert what must hold between steps; for tests."""
        for group in self.groups:
            group.check_integrity()
        norm = self._record.grad_norm
        assert norm is None or norm >= 0 or math.isnan(norm), norm


def _let_go(handles: list[Removable], groups: Sequence[ShardGroup]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    release_states(groups)
    for group in groups:
        group.retire()


def _autocast_dtype(parts: Parts) -> torch.dtype | None:
    section = parts.config.torch_autocast
    if not section.enabled:
        return None
    return dtype_from_name(section.dtype) if section.dtype else torch.bfloat16


def _is_time_to_trim(step: int) -> bool:
    """Say whether the heap is to be tidied after this step: at first, while it finds its size, and rarely later."""
    return step <= 2 or step % TRIM_EVERY == 0
