"""Copies that own their memory."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch

from craken.checkpoint import clone_tensors_for_torch_save

Point = namedtuple("Point", "x y")


def test_views_of_a_large_buffer_become_small_tensors_of_their_own() -> None:
    flat = torch.arange(1000.0)
    state = OrderedDict(w=flat[10:16].view(2, 3), nested={"t": (flat[:1], [flat[1:2]])})
    copy = clone_tensors_for_torch_save(state)
    assert type(copy) is OrderedDict
    assert torch.equal(copy["w"], flat[10:16].view(2, 3))
    assert copy["w"].untyped_storage().nbytes() == 24
    assert copy["nested"]["t"][1][0].untyped_storage().nbytes() == 4
    flat.zero_()
    assert copy["w"].flatten().tolist() == [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]


def test_copies_are_detached_contiguous_and_keep_their_dtype() -> None:
    weight = torch.nn.Parameter(torch.arange(6).reshape(2, 3).bfloat16())
    copy = clone_tensors_for_torch_save([weight.t()])[0]
    assert not copy.requires_grad
    assert copy.is_contiguous()
    assert copy.dtype == torch.bfloat16
    assert torch.equal(copy, weight.detach().t())


def test_tied_tensors_stay_tied() -> None:
    weight = torch.ones(3)
    copy = clone_tensors_for_torch_save({"embed": weight, "head": weight})
    assert copy["embed"] is copy["head"]
    assert copy["embed"] is not weight


def test_other_values_and_container_types_are_kept() -> None:
    marker = object()
    copy = clone_tensors_for_torch_save({"p": Point(torch.ones(1), marker), "n": None, "s": "text"})
    assert type(copy["p"]) is Point
    assert copy["p"].y is marker
    assert (copy["n"], copy["s"]) == (None, "text")


def test_the_device_can_be_chosen() -> None:
    assert clone_tensors_for_torch_save(torch.ones(2), device="meta").device.type == "meta"
