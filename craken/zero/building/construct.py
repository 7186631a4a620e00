"""Builds models that fit nowhere whole: inside of `Init`, a module's parameters become shards as soon as it is built.

    Linear.__init__   weight and bias are made on every rank, whole, and get their values
           returns    cast, moved to the device, rank 0's values sent to all; of each, a rank keeps its shard
    Block.__init__    builds its layers one after another, each as above
           returns    now the parameters of its own, if it has any

At most one module is whole at a time, besides what a constructor reaches into (lending.py). The Parameter objects stay,
as empty placeholders: optimizers may be made from them, modules may share them. `GatheredParameters` brings them
together before there is an engine; `initialize` lays them out anew. Tensor constructors are left alone. Clients know
this module as `partition_parameters`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from enum import Enum
from types import TracebackType
from typing import Any

import torch
from torch import nn

from craken.comm import axis_over, get_accelerator, init_distributed
from craken.zero.access.attributes import place_of
from craken.zero.access.gathered import GatheredParameters, register_external_parameter, unregister_external_parameter
from craken.zero.building.lending import Lending
from craken.zero.building.settings import say_what_has_no_effect, settings_from
from craken.zero.building.sharder import Sharder
from craken.zero.building.wrapping import ConstructionWatch
from craken.zero.memory.heap import returning_freed_memory
from craken.zero.memory.placement import Place
from craken.zero.plans.policy import Keep, policy_for_stage
from craken.zero.weights import ZeroParamStatus

__all__ = [
    "DeepSpeedTensorOverride",
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "get_accelerator",
    "paused",
    "register_external_parameter",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]

_orig_torch_arange = torch.arange  # transformers compares constructors with it


def zero_wrapper_for_fp_tensor_constructor(
    fn: Callable[..., Any], target_fp_dtype: torch.dtype, target_device: torch.device
) -> Callable[..., Any]:
    """Return `fn`: tensor constructors are not changed here, but transformers replaces this function by its name."""
    return fn


class DeepSpeedTensorOverride(Enum):
    """What of a parameter is changed when its module has been built."""

    dtype = 1
    device = 2


class Init:
    """Have the parameters of every module that is built inside kept as shards. Collective over all ranks of the group.

    Each module's parameters are cast (to `dtype`, or what the config's fp16 and bf16 sections say), moved to the device
    and sharded when its constructor has returned, with rank 0's values; its buffers are moved. `Module.apply` sees
    whole parameters; rank 0's results stay. Of the config only `fp16.enabled`, `bf16.enabled`, the ZeRO stage and
    `offload_param` are read, so it may be unfinished ("auto"). A stage that keeps parameters whole makes this
    do nothing, and so does an `Init` around it. `module=` converts a module that is there already, perhaps on meta.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Iterable[DeepSpeedTensorOverride] = tuple(DeepSpeedTensorOverride),
    ) -> None:
        """The arguments are DeepSpeed's; `initialize` decides anew where weights wait and how they travel.

        pin_memory: host memory that shards wait in is page-locked, if the config's `offload_param` does not say so.
        tensor_overrides: without its `dtype`, parameters keep theirs.
        """
        given, overrides = config if config_dict_or_path is None else config_dict_or_path, set(tensor_overrides or ())
        settings = settings_from(given, dtype=dtype, remote_device=remote_device, pin_memory=pin_memory)
        if DeepSpeedTensorOverride.dtype not in overrides:
            settings = replace(settings, dtype=None)
        self._settings = settings
        say_what_has_no_effect(
            settings.policy if enabled else policy_for_stage(0),
            mem_efficient_linear=not mem_efficient_linear,
            pin_memory=pin_memory and settings.place is Place.DEVICE,
            zero_param_parallel_group=zero_param_parallel_group,
            zero_quantized_weights=zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
            param_swapper=param_swapper,
            tensor_overrides=DeepSpeedTensorOverride.device not in overrides,
        )
        self.enabled = enabled and self._settings.policy.params is Keep.SHARD
        self._group = sequence_data_parallel_group or data_parallel_group
        if self._group is None and mpu is not None:
            self._group = mpu.get_data_parallel_group()
        if self.enabled and module is not None:
            sharder = self._sharder()
            with returning_freed_memory():
                for part in module.modules():
                    sharder.shard_module(part)

    def __enter__(self) -> Init:
        if self.enabled:
            _open.append(None if _open else _Building(self._sharder()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if self.enabled and (building := _open.pop()) is not None:
            building.stop(kind)

    def _sharder(self) -> Sharder:
        init_distributed()
        return Sharder(axis_over(self._group), self._settings)


class _Building:
    """What the outermost `Init` has changed while it is open."""

    def __init__(self, sharder: Sharder) -> None:
        self._sharder = sharder
        self.watch = ConstructionWatch(self._built)
        self._lending = Lending(self.watch)
        self._habits = contextlib.ExitStack()
        self._habits.enter_context(returning_freed_memory())
        try:
            self.watch.start()
            self._replace_apply(nn.Module.apply)
            self._replace_copy(nn.Parameter.__deepcopy__)
        except BaseException:
            self.watch.stop()
            raise

    def stop(self, kind: type[BaseException] | None) -> None:
        self.watch.stop()
        self._lending.stop(kind)
        self._habits.close()

    def _built(self, module: nn.Module) -> None:
        self._lending.constructor_returned()
        self._sharder.shard_module(module)
        self._lending.watch(module)

    def _replace_apply(self, original: Any) -> None:
        def apply(module: nn.Module, fn: Callable[[nn.Module], None]) -> nn.Module:
            if self.watch.is_paused:
                original(module, fn)
                return module
            for child in module.children():
                child.apply(fn)
            with GatheredParameters(module.parameters(recurse=False), modifier_rank=0):
                fn(module)
            return module

        self.watch.replace(nn.Module, "apply", apply)

    def _replace_copy(self, original: Any) -> None:
        """Make copies of shards shards, unless a block has gathered them (nn.TransformerEncoder copies a layer)."""

        def copy(param: nn.Parameter, memo: dict[int, Any]) -> Any:
            place = place_of(param)
            is_users = place is None or (place.gatherers and not self._lending.has_lent(param))
            if self.watch.is_paused or is_users or id(param) in memo:
                return original(param, memo)
            with GatheredParameters(param):
                twin = original(param, memo)
            self._sharder.shard_parameter("a copy", twin)
            return twin

        self.watch.replace(nn.Parameter, "__deepcopy__", copy)


_open: list[_Building | None] = []  # the blocks that are open; only the outermost, the first, does anything


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Build modules inside as if no `Init` were open."""
    watch = _open[0].watch if _open and _open[0] is not None else None
    was_paused = watch is None or watch.is_paused
    if watch is not None:
        watch.is_paused = True
    try:
        yield
    finally:
        if watch is not None:
            watch.is_paused = was_paused
