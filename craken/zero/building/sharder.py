"""Turns the parameters of one module after another into shards, each parameter a group of its own.

Nothing is known yet of what will be trained, nor of the order in which weights are used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from craken.comm import MeshAxis, get_accelerator, transport_for
from craken.log import warn_once
from craken.precision import Precision
from craken.zero.access.attributes import place_of, register
from craken.zero.building.groups import is_castable
from craken.zero.building.quantised_layers import must_stay_whole
from craken.zero.building.settings import BuildSettings
from craken.zero.group import ShardGroup
from craken.zero.memory.link import Link
from craken.zero.memory.placement import Placement
from craken.zero.memory.shelf import Shelf
from craken.zero.residence import Ceilings, Residence
from craken.zero.rules import GroupRules, Sources, Wire


class Sharder:
    """Shards modules over the ranks of an axis."""

    def __init__(self, axis: MeshAxis, settings: BuildSettings) -> None:
        """Collective over `axis`."""
        shelf = Shelf(Link(get_accelerator().device()), settings.disks)
        placement = Placement(weights=settings.place, pins_weights=settings.pins)
        placement = placement.resolve(host_is_device=shelf.link.host_is_device)
        transport = transport_for(axis)
        self._wire = Wire(axis, transport, shelf, Sources(transport, transport))
        precision = Precision(compute=settings.dtype)
        self._rules = GroupRules(settings.policy, precision, trains=False, placement=placement)

    def shard_module(self, module: nn.Module) -> None:
        """Collective: shard a module's own parameters (not its children's), and move its buffers to the device.

        What is on the meta device gets memory and, where the module can `reset_parameters`, values.
        """
        with torch.no_grad(), self._wire.device:
            _materialise(module, self._wire.device)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self._wire.device:
                    module._buffers[name] = buffer.to(self._wire.device)
            for name, param in module.named_parameters(recurse=False):
                self.shard_parameter(f"{type(module).__name__}.{name}", param)

    def shard_parameter(self, name: str, param: nn.Parameter) -> None:
        """Collective: shard a parameter, unless it is sharded already or not of a kind that can be."""
        if place_of(param) is not None or is_lazy(param) or not param.numel():
            return
        if hasattr(param, "quant_state") or must_stay_whole(param):
            return
        compute = self._rules.precision.compute
        dtype = compute if compute is not None and is_castable(param) else param.dtype
        group = ShardGroup([name], [param], dtype, self._rules, self._wire)
        register([group], self._wire.axis, Residence([group], Ceilings(ahead=0, live=0)))


def _materialise(module: nn.Module, device: torch.device) -> None:
    """Give a module's own parameters and buffers memory if they are on the meta device; the objects stay."""
    params = [param for param in module.parameters(recurse=False) if param.is_meta]
    buffers = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
    if not params and not buffers:
        return
    for param in params:
        real = torch.zeros_like(param, device=device).as_subclass(type(param)).requires_grad_(param.requires_grad)
        real.__dict__.update(param.__dict__)
        torch.utils.swap_tensors(param, real)  # type: ignore[no-untyped-call]
    for name in buffers:
        buffer = module._buffers[name]
        assert isinstance(buffer, Tensor)
        module._buffers[name] = torch.zeros_like(buffer, device=device)
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        warn_once(
            f"zero.Init: {type(module).__name__} was built on the meta device and has no reset_parameters(): its "
            "values are zeros until you load some"
        )
