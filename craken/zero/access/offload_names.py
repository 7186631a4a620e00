"""The hooks of a model whose weights come and go, under the names by which clients take them off and put them back on.

    with GatheredParameters(model.parameters()):
        for hook in offload.forward_hooks + offload.backward_hooks: hook.remove()
        ...                                                             forwards run on whole weights, nothing is freed
        offload._register_deepspeed_module(offload.module)              from here on weights come and go again

Names are DeepSpeed's (`DeepSpeedZeRoOffload`), as TRL uses them around generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import nn

from craken.zero.access.gathered import external_parameters
from craken.zero.access.merging import have_merges_find_weights
from craken.zero.group import ShardGroup
from craken.zero.hooks import watch_reads, watch_units
from craken.zero.lifecycle import Lifecycle, Removable
from craken.zero.plans.units import Unit

_EXTERNAL = "ds_external_parameters"


class ParamCoordinator:
    """What clients ask of the recorded order. It is recorded anew at every change: there is none to invalidate."""

    def is_invalid_trace(self) -> bool:
        return False

    def _invalidate_trace(self) -> None:
        pass


class ParameterOffload:
    """A model's hooks. Those of backward are set by each forward, on what it returns: `backward_hooks` stays empty.

    Also what a stage-3 engine without an optimizer has in its place.
    """

    def __init__(
        self, module: nn.Module, units: Sequence[Unit], groups: Sequence[ShardGroup], lifecycle: Lifecycle
    ) -> None:
        """groups: those whose weights are freed. The hooks are on when this returns."""
        self.module = module
        self.param_coordinator = ParamCoordinator()
        self.forward_hooks: list[Removable] = []
        self.backward_hooks: list[Removable] = []
        self._units, self._groups, self._lifecycle = units, groups, lifecycle
        self._register_deepspeed_module(module)
        have_merges_find_weights(module)

    def _register_deepspeed_module(self, module: nn.Module) -> None:
        """Set all hooks anew."""
        self._lifecycle.remove_hooks()
        module.__dict__[_EXTERNAL] = partial(_named_external_parameters, module)
        self.forward_hooks = [
            *watch_units(self._units, self._lifecycle),
            *watch_reads(module, self._groups, self._lifecycle),
        ]
        self.backward_hooks = []
        self._lifecycle.handles = [*self.forward_hooks]


def _named_external_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) for what was registered with `module` though it is another module's."""
    names = {id(param): name for name, param in module.named_parameters()}
    for param in external_parameters(module):
        yield names.get(id(param), ""), param
