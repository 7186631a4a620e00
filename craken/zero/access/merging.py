"""Layers that add adapters into their weights, and take them out again, when asked (PEFT): they find them whole.

    model.merge_adapter()           layer by layer: gather, add, and what was added goes into the shards
    model.merge_and_unload()        the same; what is left are the layers that were adapted

Nothing of it is a forward, so the hooks that bring weights would not notice. Inside of a block of GatheredParameters
without a modifier, what was added goes with the block: good for a look at merged weights (TRL hands them to vLLM, then
unmerges), a mistake where layers are left merged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from craken.log import warn_once
from craken.zero.access.gathered import GatheredParameters, block_that_discards


def merge(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Collective over all ranks: the layer's own `merge`, on whole weights."""
    return _change(layer, partial(type(layer).merge, layer, *args, **kwargs))


def unmerge(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """Collective over all ranks: the layer's own `unmerge`, on whole weights."""
    return _change(layer, partial(type(layer).unmerge, layer, *args, **kwargs))


def _change(layer: Any, change: Callable[[], Any]) -> Any:
    before = _merged_in(layer)
    with GatheredParameters(layer.parameters(), modifier_rank=0):
        result = change()
    blocks = map(block_that_discards, layer.get_base_layer().parameters(recurse=False))
    if (block := next(filter(None, blocks), None)) is not None:
        block.before_end(layer, partial(_warn_if_other, layer, before))
    return result


def _merged_in(layer: Any) -> list[str]:
    return [*getattr(layer, "merged_adapters", ())]


def _warn_if_other(layer: Any, before: list[str]) -> None:
    if _merged_in(layer) != before:
        warn_once(
            "adapters were merged or unmerged inside of GatheredParameters without modifier_rank, which ends now: what "
            "that changed is lost, though the layers count on it. Merge outside of such a block (layers are gathered "
            "one by one), give it modifier_rank=0, or undo it before it ends"
        )


def have_merges_find_weights(model: nn.Module) -> None:
    """Have every layer with adapters merge on whole weights. Stays: where weights are ordinary it changes nothing."""
    for module in model.modules():
        if all(hasattr(type(module), name) for name in ("merge", "unmerge", "get_base_layer")):
            # bound methods of these names: copies of the layer get their own, and they can be pickled
            module.merge = MethodType(merge, module)  # type: ignore[assignment]
            module.unmerge = MethodType(unmerge, module)  # type: ignore[assignment]
