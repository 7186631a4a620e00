"""The accessors that only DeepSpeed's users call, as one thin layer over the engine."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from craken.checkpoint import BackgroundSaver, Stall, Target, do_on_all, place_of
from craken.disk import Traffic
from craken.engine import loading, saving
from craken.engine.build import Parts
from craken.engine.consolidate import consolidated_state_dict, save_weights
from craken.engine.engine import Engine
from craken.log import warn_once
from craken.zero import Keep, ParameterOffload, ShardedOptimizer, bytes_by_place, compiler_is_loaded, policy_for_stage
from craken.zero.parking import KINDS, states_of_kinds


class DeepSpeedEngine(Engine):
    """What `initialize` returns: the engine, under every name that DeepSpeed's users know."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._background = BackgroundSaver()

    @property
    def config(self) -> dict[str, Any]:
        """The config as the user gave it; hides a `config` of the module, as in DeepSpeed."""
        raw = self.parts.config.raw
        return raw if isinstance(raw, dict) else dict(raw)

    @property
    def micro_steps(self) -> int:
        return self.accumulation.micro_steps

    @property
    def global_samples(self) -> int:
        return self.global_steps * self.train_batch_size()

    @property
    def world_size(self) -> int:
        return self.parts.axis.size

    dp_world_size = world_size

    @property
    def global_rank(self) -> int:
        return self.parts.axis.rank

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def train_batch_size(self) -> int:
        """Return the samples of one step over all ranks."""
        return self.parts.stride.batch.micro_batch_size * self.accumulation.steps * self.parts.axis.size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.parts.stride.batch.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation.steps

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples of a step; micro-batch and ranks stay, the accumulation count follows."""
        unit = self.train_micro_batch_size_per_gpu() * self.parts.axis.size
        if train_batch_size < 1 or train_batch_size % unit:
            raise ValueError(
                f"train_batch_size: expected a multiple of micro-batch {self.train_micro_batch_size_per_gpu()} x "
                f"{self.parts.axis.size} ranks = {unit}, got {train_batch_size}"
            )
        self.accumulation.steps = train_batch_size // unit
        if self.accumulation.steps > 1:
            self._begin_accumulating()

    def gradient_clipping(self) -> float:
        return self.parts.stride.max_norm

    def zero_optimization_stage(self) -> int:
        return self.parts.config.zero_optimization.stage

    def zero_optimization(self) -> bool:
        """Say whether anything is sharded."""
        return bool(self.groups) and self.groups[0].policy.optimizer is Keep.SHARD

    def zero_gather_16bit_weights_on_model_save(self) -> bool:
        return self.parts.config.zero_optimization.stage3_gather_16bit_weights_on_model_save

    def fp16_enabled(self) -> bool:
        return self.parts.config.fp16.enabled

    def bfloat16_enabled(self) -> bool:
        return self.parts.config.bf16.enabled

    def get_loss_scale(self) -> float:
        return self.loss_scaler.value

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.value

    cur_scale = loss_scale

    def dynamic_loss_scale(self) -> bool:
        """Say whether the loss scale moves."""
        return self.parts.config.fp16.enabled and self.parts.config.fp16.loss_scale == 0

    def was_step_applied(self) -> bool:
        """Say whether the last `step()` updated parameters: it was at a boundary and not skipped."""
        return self._record.was_applied

    def steps_per_print(self) -> float | None:
        return self.parts.config.steps_per_print

    def wall_clock_breakdown(self) -> bool:
        return self.parts.config.wall_clock_breakdown

    def get_mom(self) -> list[Any]:
        """Return each optimizer group's momentum, or its betas."""
        groups = self.optimizer.param_groups if isinstance(self.optimizer, ShardedOptimizer) else []
        return [group.get("momentum", group.get("betas", 0.0)) for group in groups]

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Tensor]:
        """Return the module's state dict, optionally without frozen parameters."""
        state: dict[str, Tensor] = self.module.state_dict()
        if exclude_frozen_parameters:
            frozen = {name for name, param in self.module.named_parameters() if not param.requires_grad}
            state = {name: value for name, value in state.items() if name not in frozen}
        return state

    def compile(
        self,
        backend: Any = "inductor",
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the module in place, at its next forward; a second call does nothing. Names in its state dict stay.

        compile_kwargs: of `torch.compile`; a `backend` among them wins. Where weights come and go, a graph ends at each
        unit: `fullgraph` raises. NotImplementedError for DeepCompile's `schedule` and for compiled autograd.
        """
        if schedule is not None or compiled_autograd_enabled:
            raise NotImplementedError("engine.compile has no schedule and no compiled autograd yet; leave them out")
        if self.is_compiled:
            return
        was_loaded = compiler_is_loaded()
        self.module.compile(**{"backend": backend, **(compile_kwargs or {})})
        hooks = getattr(self.optimizer, "parameter_offload", self.optimizer)
        if isinstance(hooks, ParameterOffload) and not was_loaded:
            hooks._register_deepspeed_module(self.module)  # these stay out of its graphs

    @property
    def is_compiled(self) -> bool:
        """Say whether the module as a whole was compiled in place."""
        return self.module._compiled_call_impl is not None

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        keep_last: int | None = None,
    ) -> bool:
        """Collective: write `save_dir`/`tag` (default `global_step<N>`), and point `latest` at it.

        client_state: JSON values, tensors, arrays, tuples, bytes; returned by `load_checkpoint`. keep_last: afterwards
        delete older checkpoints in `save_dir` beyond so many; default `checkpoint.keep_last` in the config. With
        `checkpoint.async_save` it returns once the state is copied, and raises what went wrong with the save before.
        """
        self.standing.check("save_checkpoint()")
        self._reducer.let_go_of_taken()
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        saving.save(
            self,
            Target(place_of(save_dir), name, save_latest, keep_last),
            client_state=client_state or {},
            includes_frozen=not exclude_frozen_parameters,
            background=self._background,
        )
        return True

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """End a micro-batch; see `Engine.step`. At the boundary, after the update, on all ranks alike, it raises what
        went wrong with a checkpoint that was being saved in the background: OSError or RuntimeError."""
        num_steps = self.global_steps
        super().step(lr_kwargs)
        if self.global_steps > num_steps:
            self._background.look(self.parts.axis)

    def wait_for_checkpoint(self) -> None:
        """Return once a checkpoint that is being saved in the background is on the disk; call it on all ranks.

        Raises what went wrong with it, the same on all ranks: OSError when a file system refused, else RuntimeError.
        """
        self._background.wait()

    @property
    def checkpoint_stall(self) -> Stall | None:
        """How long training stood still for the last save in the background, on this rank; None before one."""
        return self._background.stall

    def destroy(self) -> None:
        """Take all hooks off the module, after waiting for a checkpoint that is being saved; see `Engine.destroy`."""
        try:
            self.wait_for_checkpoint()
        finally:
            super().destroy()

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        map_location: Any = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Collective: restore what `save_checkpoint` wrote; `tag` defaults to what `latest` names.

        Returns (path, client_state); (None, None) with a warning when there is no `latest`. map_location has no effect:
        tensors go where the engine keeps its own. An engine that an error left half loaded refuses to go on until it
        has loaded a checkpoint.
        """
        self.parking.check_empty("load_checkpoint()")
        self.wait_for_checkpoint()
        what = loading.Wanted(
            is_strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            progress=not load_module_only,
        )
        return loading.load(self, load_dir, None if tag is None else str(tag), what)

    @property
    def _frees_weights(self) -> bool:
        return policy_for_stage(self.zero_optimization_stage()).frees_params

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> OrderedDict[str, Tensor] | None:
        """Collective: return whole weights on rank 0's host, None elsewhere; ValueError below stage 3."""
        if not self._frees_weights:
            raise ValueError("weights are whole on every rank below stage 3: use module.state_dict()")
        return consolidated_state_dict(self, exclude_frozen=exclude_frozen_parameters)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Collective: write whole weights in the compute dtype to `save_dir`/`save_filename`, by rank 0.

        A name that ends in .safetensors makes a safetensors file. False with a warning at stage 3 unless the config
        sets `stage3_gather_16bit_weights_on_model_save`.
        """
        self.standing.check("save_16bit_model()")
        self._reducer.let_go_of_taken()
        if self._frees_weights and not self.zero_gather_16bit_weights_on_model_save():
            warn_once(
                "save_16bit_model() saved nothing: set zero_optimization.stage3_gather_16bit_weights_on_model_save to "
                "true, as it gathers the weights on rank 0's host"
            )
            return False
        state = consolidated_state_dict(self, exclude_frozen=exclude_frozen_parameters)
        path = Path(save_dir) / save_filename
        do_on_all(partial(save_weights, state, path), self.parts.axis, doing=f"writing {path}")
        return True

    save_fp16_model = save_16bit_model

    # --- where memory goes --------------------------------------------------------------------------------------------

    def memory_ledger(self) -> dict[str, int]:
        """Return the bytes this rank holds of weights, masters, optimizer states and gradients.

        By where they are: "device", "host" (not counted apart where it is the device's memory) and "nvme" (files).
        """
        return dict(bytes_by_place(self.groups, self.parts.layers.frozen, self.parts.binding))

    def swap_statistics(self) -> list[Traffic]:
        """Return what has moved between memory and each disk so far, bytes and seconds."""
        return self.parts.shelf.traffic()

    # --- device memory, given up for a while --------------------------------------------------------------------------

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move states from the device to the host until `reload_states`; in between, neither forward nor step runs.

        include: of "optim_states", "hp_params" (masters), "lp_params" (weights), "lp_grads", or their enum; default
        all. Returns when the device's memory is free, whatever `non_blocking` says: torch keeps it for other tensors.
        """
        if str(device) != "cpu":
            raise ValueError(f"offload_states(device=...): expected 'cpu', got {str(device)!r}")
        asked = [str(getattr(kind, "value", kind)) for kind in (KINDS if include is None else include)]
        unknown = sorted(set(asked) - set(KINDS) - {"contiguous_grad_buffer"})
        if unknown:
            raise ValueError(f"offload_states(include=...): expected some of {', '.join(KINDS)}, got {unknown}")
        if self.parts.shelf.link.host_is_device:
            warn_once("offload_states(): host and device are one memory here, nothing moves")
            return
        self._reducer.abandon_backward()
        tensors = states_of_kinds(self.groups, self.parts.layers.frozen, self.parts.binding, asked)
        self.parking.take(tensors, pins=pin_memory)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back to the device what `offload_states` moved away."""
        self.parking.bring_back()
