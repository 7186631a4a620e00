"""The dataloader: every rank its own samples, all of them once, resumable to the batch."""

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from craken.comm import MeshAxis
from craken.engine.data import RepeatingLoader, ResumableLoader


def axis(rank=0, size=1):
    return MeshAxis("dp", None, rank, size)


def loader(rank=0, size=1, num=20, batch=3, **options):
    return ResumableLoader(TensorDataset(torch.arange(num)), batch, axis(rank, size), **options)


def samples(batches):
    return [int(value) for (batch,) in batches for value in batch]


def test_ranks_share_an_epoch_without_overlap():
    seen = [samples(loader(rank, 4)) for rank in range(4)]
    assert sorted(value for one in seen for value in one) == list(range(20))


def test_ranks_stay_in_step_when_samples_do_not_divide():
    seen = [samples(loader(rank, 3)) for rank in range(3)]
    assert {len(one) for one in seen} == {7}
    assert {value for one in seen for value in one} == set(range(20))


def test_epochs_differ_and_are_the_same_for_everyone():
    first, second = loader(), loader()
    one, two = samples(first), samples(first)
    assert one != two
    assert [samples(second), samples(second)] == [one, two]


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_resuming_goes_on_with_the_next_batch(stop):
    whole = loader()
    epochs = [samples(whole), samples(whole)]
    interrupted = loader()
    samples(interrupted)
    iterator = iter(interrupted)
    head = samples(next(iterator) for _ in range(stop)) if stop else []
    if stop == 0:
        interrupted.epoch, interrupted._batches_done = 1, 0
    resumed = loader()
    resumed.load_state_dict(interrupted.state_dict())
    assert head + samples(resumed) == epochs[1]
    assert samples(resumed) == samples(whole)  # and then the third epoch


def test_len_counts_batches_of_this_rank():
    assert len(loader()) == 7
    assert len(loader(drop_last=True)) == 6
    assert len(loader(0, 4)) == 2


def test_too_little_data_names_the_numbers():
    with pytest.raises(ValueError, match=r"training_data has 5 samples.*3 x 2 = 6.*lower train_micro_batch"):
        loader(0, 2, num=5)


class Counting(IterableDataset):
    def __iter__(self):
        return iter(range(10))


def test_an_iterable_data_set_is_read_up_to_the_place():
    first = ResumableLoader(Counting(), 2, axis())
    iterator = iter(first)
    next(iterator), next(iterator)
    resumed = ResumableLoader(Counting(), 2, axis())
    resumed.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in resumed] == [[4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_share_an_iterable_data_set_evenly(num_ranks):
    each = [
        [sample for batch in ResumableLoader(Counting(), 1, axis(rank, num_ranks)) for sample in batch.tolist()]
        for rank in range(num_ranks)
    ]
    rounds = 10 // num_ranks
    assert {len(samples) for samples in each} == {rounds}
    assert sorted(sample for samples in each for sample in samples) == list(range(rounds * num_ranks))


def test_repeating_loader_starts_again_and_refuses_nothing():
    repeating = RepeatingLoader([1, 2])
    assert [next(repeating) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="has no batches"):
        next(RepeatingLoader([]))
