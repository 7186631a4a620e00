"""Blocks: every element once, aligned across lists, written through, small on the CPU."""

import torch

from craken.optim.blocks import runs

SIZES = [0, 3, 70_000, 65_536, 1, 200_000, 40_000, 40_000]
LIMIT = 65_536


def test_blocks_cover_every_element_once_and_write_through():
    tensors = [torch.zeros(size) for size in SIZES]
    marks = [torch.arange(size, dtype=torch.float32) for size in SIZES]
    for run in runs(tensors, marks):
        blocks, figures = run.lists
        for block, figure in zip(blocks, figures, strict=True):
            block.add_(figure + 1)
    for tensor, mark in zip(tensors, marks, strict=True):
        assert torch.equal(tensor, mark + 1)


def test_runs_stay_small_and_name_their_owners():
    tensors = [torch.full((size,), float(index)) for index, size in enumerate(SIZES)]
    for run in runs(tensors):
        assert sum(block.numel() for block in run.lists[0]) <= LIMIT
        assert [block[0].item() for block in run.lists[0]] == run.owners


def test_a_run_holds_one_dtype():
    tensors = [torch.zeros(4), torch.zeros(4, dtype=torch.float64), torch.zeros(4)]
    assert [run.owners for run in runs(tensors)] == [[0], [1], [2]]


def test_tensors_without_a_flat_view_come_in_one_piece():
    strided = torch.zeros(400, 300).t()
    (run,) = runs([strided], [torch.zeros(300, 400)])
    assert run.lists[0][0].shape == (300, 400)
    run.lists[0][0].fill_(1.0)
    assert strided.sum() == 120_000


def test_nothing_gives_no_runs():
    assert list(runs([], [])) == []
    assert list(runs([torch.zeros(0)])) == []
