"""Layers that add adapters into their weights, and take them out again, when asked (PEFT): they find them whole.

    model.merge_adapter()           layer by layer: gather, add, and what was added goes into the shards
    model.merge_and_unload()        the same; what is left are the layers that were adapted

Nothing of it is a forward, so the hooks that bring weights would not notice.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from craken.zero.access.gathered import GatheredParameters


def merge(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Collective over all ranks: the layer's own `merge`, on whole weights."""
    with GatheredParameters(layer.parameters(), modifier_rank=0):
        return type(layer).merge(layer, *args, **kwargs)


def unmerge(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Collective over all ranks: the layer's own `unmerge`, on whole weights."""
    with GatheredParameters(layer.parameters(), modifier_rank=0):
        return type(layer).unmerge(layer, *args, **kwargs)


def have_merges_find_weights(model: nn.Module) -> None:
    """Have every layer with adapters merge on whole weights. Stays: where weights are ordinary it changes nothing."""
    for module in model.modules():
        if all(hasattr(type(module), name) for name in ("merge", "unmerge", "get_base_layer")):
            # bound methods of these names: copies of the layer get their own, and they can be pickled
            module.merge = MethodType(merge, module)  # type: ignore[assignment]
            module.unmerge = MethodType(unmerge, module)  # type: ignore[assignment]
