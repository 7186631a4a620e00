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


def steps(loaders, accumulation, num_steps, *, num_before=0):
    """Return the sets of samples that ranks see in each step, from new iterators, `num_before` micro-batches done."""
    iterators = [iter(loader) for loader in loaders]
    for iterator in iterators:
        for _ in range(num_before):
            next(iterator)
    found = []
    for _ in range(num_steps):
        batches = [next(iterator) for iterator in iterators for _ in range(accumulation)]
        found.append(sorted(int(value) for batch in batches for value in batch[0].tolist()))
    return found


SPLITS = [(1, 12, 1), (1, 3, 4), (2, 3, 2), (4, 3, 1), (2, 1, 6), (3, 2, 2), (3, 4, 1)]  # ranks, micro-batch, passes


@pytest.mark.parametrize("num", [48, 53])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_step_is_of_the_same_samples_however_it_is_split_and_resumed(num, drop_last):
    whole = steps([loader(num=num, batch=12, drop_last=drop_last)], 1, 4)
    saved = {}
    for ranks, batch, passes in SPLITS:
        loaders = [loader(rank, ranks, num, batch, drop_last=drop_last) for rank in range(ranks)]
        assert steps(loaders, passes, 2) == whole[:2]
        (saved[ranks, batch, passes],) = {tuple(one.state_dict().items()) for one in loaders}
    assert len(set(saved.values())) == 1
    for ranks, batch, passes in SPLITS:
        loaders = [loader(rank, ranks, num, batch, drop_last=drop_last) for rank in range(ranks)]
        for one in loaders:
            one.load_state_dict(dict(saved[4, 3, 1]))
        assert steps(loaders, passes, 2) == whole[2:]


@pytest.mark.parametrize(("ranks", "batch"), [(1, 5), (2, 4), (3, 3), (4, 2)])
def test_steps_of_another_size_go_on_at_the_next_sample(ranks, batch):
    first = [loader(rank, 2, 48, 6) for rank in range(2)]
    seen = steps(first, 1, 2)
    resumed = [loader(rank, ranks, 48, batch) for rank in range(ranks)]
    for one in resumed:
        one.load_state_dict(first[0].state_dict())
    rest = sorted(value for one in resumed for value in samples(one))
    unseen = set(range(48)) - set(seen[0]) - set(seen[1])
    assert set(rest) >= unseen
    assert len(rest) == -(-len(unseen) // ranks) * ranks, "more than fills up the ranks was read twice"


def test_drop_last_hands_nothing_out_twice():
    seen = [samples(loader(rank, 2, num=7, batch=2, drop_last=True)) for rank in range(2)]
    assert [len(one) for one in seen] == [2, 2]  # with the eighth filled up there would be two batches each
    assert len({*seen[0], *seen[1]}) == 4


def test_a_place_that_counts_batches_of_each_rank_is_still_read():
    first = [loader(rank, 2) for rank in range(2)]
    steps(first, 1, 2)
    resumed = loader(1, 2)
    resumed.load_state_dict({"epoch": 0, "batches_done": 2})
    assert resumed.state_dict() == first[1].state_dict()
    resumed.load_state_dict({"epoch": -1, "batches_done": 0})
    assert samples(resumed) == samples(loader(1, 2))


def test_loading_ends_iterators_under_way_and_the_next_goes_on_there():
    whole = loader()
    epochs = [samples(whole) for _ in range(3)]
    other = loader()
    not_begun = iter(other)
    other.load_state_dict({"epoch": 1, "samples_done": 6})
    assert samples(not_begun) == epochs[1][6:]
    under_way = iter(other)
    assert samples([next(under_way)]) == epochs[2][:3]
    other.load_state_dict({"epoch": 0, "samples_done": 9})
    assert list(under_way) == []
    assert other.state_dict() == {"epoch": 0, "samples_done": 9}
    assert samples(other) == epochs[0][9:]
    assert samples(other) == epochs[1]


def test_a_repeating_loader_under_way_goes_on_where_the_state_says():
    whole = loader()
    epochs = [samples(whole) for _ in range(2)]
    inner = loader()
    repeating = RepeatingLoader(inner)
    next(repeating)
    inner.load_state_dict({"epoch": 0, "samples_done": 21})  # its end
    assert samples([next(repeating)]) == epochs[1][:3]


def test_an_older_iterator_goes_on_and_does_not_count():
    one = loader()
    older, newer = iter(one), iter(one)
    next(older), next(newer), next(older), next(older)
    assert one.state_dict() == {"epoch": 1, "samples_done": 3}
    assert len(list(older)) == 4
    assert one.state_dict() == {"epoch": 1, "samples_done": 3}


def test_saved_after_an_epoch_the_next_follows():
    whole = loader()
    samples(whole)
    resumed = loader()
    resumed.load_state_dict(whole.state_dict())
    assert samples(resumed) == samples(whole)


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


def test_an_iterable_data_set_goes_on_at_the_same_sample_on_other_ranks():
    first = [ResumableLoader(Counting(), 1, axis(rank, 2)) for rank in range(2)]
    iterators = [iter(one) for one in first]
    seen = [next(one).item() for _ in range(2) for one in iterators]
    resumed = ResumableLoader(Counting(), 2, axis())
    resumed.load_state_dict(first[0].state_dict())
    assert seen + [sample for batch in resumed for sample in batch.tolist()] == list(range(10))


def test_repeating_loader_starts_again_and_refuses_nothing():
    repeating = RepeatingLoader([1, 2])
    assert [next(repeating) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="has no batches"):
        next(RepeatingLoader([]))
