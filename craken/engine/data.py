"""The dataloader that `initialize(training_data=...)` returns: each rank its own samples, resumable to the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from craken.comm import MeshAxis

T = TypeVar("T")


class ShardedSampler(Sampler[int]):
    """Every `axis.size`-th index of a shuffled data set, the same number on every rank.

    The order depends on (seed, epoch) alone, so ranks together take the same samples in the same order however many
    they are. What does not divide is left out with `drop_last`, else filled up from the front, so that ranks stay in
    step. `skip` counts all ranks' samples to leave out at the start of the epoch.
    """

    def __init__(
        self, num_samples: int, axis: MeshAxis, *, drop_last: bool = False, shuffle: bool = True, seed: int = 0
    ) -> None:
        self._num_samples, self._axis = num_samples, axis
        self._drop_last, self._shuffle, self._seed = drop_last, shuffle, seed
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        num = max(self._num_samples - self.skip, 0)
        return num // self._axis.size if self._drop_last else -(-num // self._axis.size)

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self._num_samples)
        if self._shuffle:
            order = torch.randperm(self._num_samples, generator=torch.Generator().manual_seed(self._seed + self.epoch))
        filled = torch.cat([order[self.skip :], order])
        yield from filled[self._axis.rank :: self._axis.size][: len(self)].tolist()


class EveryNth(IterableDataset[Any]):
    """Every `axis.size`-th sample of an iterable data set, from this rank's on; what is left of a round is dropped.

    Each rank reads all of it: a data set that shards itself by rank should be given to a dataloader of the user's own.
    `skip` counts samples to read over at the start.
    """

    def __init__(self, dataset: IterableDataset[Any], axis: MeshAxis) -> None:
        self._dataset, self._axis = dataset, axis
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        samples = itertools.islice(self._dataset, self.skip, None)
        while len(one_each := list(itertools.islice(samples, self._axis.size))) == self._axis.size:
            yield one_each[self._axis.rank]

    def __len__(self) -> int:
        return len(self._dataset) // self._axis.size  # type: ignore[arg-type]


@dataclass
class _Place:
    """An epoch, and how many of its samples all ranks together have been handed."""

    epoch: int = 0
    samples_done: int = 0


class ResumableLoader(Generic[T]):
    """A DataLoader over this rank's samples that knows where it is; `len` counts this rank's batches an epoch.

    Each `iter` begins the next epoch, or goes on where `load_state_dict` says. The place counts samples handed out to
    all ranks together, so a run goes on at the next one on any number of ranks, with micro-batches of any size; steps
    of as many samples are of the same ones. An epoch that does not divide into whole micro-batches of all ranks ends
    with smaller ones, of which other ranks make other steps; with `drop_last` it ends before them.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        axis: MeshAxis,
        *,
        collate_fn: Callable[[list[Any]], T] | None = None,
        drop_last: bool = False,
    ) -> None:
        self.dataset, self.batch_size = dataset, batch_size
        self._num_ranks = axis.size
        self._sampler = self._stream = None
        if isinstance(dataset, IterableDataset):
            self._stream = dataset = EveryNth(dataset, axis)
        else:
            self._sampler = _sampler_for(dataset, batch_size, axis, drop_last=drop_last)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self._sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            # of its own: starting an epoch must not draw from the generator that a resumed run has restored
            generator=torch.Generator(),
        )
        self._place, self._has_begun, self._num_loads = _Place(), False, 0

    def __len__(self) -> int:
        self._seek(_Place())
        return len(self._loader)

    def __iter__(self) -> Iterator[T]:
        if self._has_begun:
            self._place = _Place(self._place.epoch + 1)
        place, num_loads, self._has_begun = self._place, self._num_loads, True
        self._seek(place)
        for batch in self._loader:
            place.samples_done += self.batch_size * self._num_ranks
            yield batch
            if self._num_loads != num_loads:
                return
        if self._place is place:  # no later iterator has begun
            self._place, self._has_begun = _Place(place.epoch + 1), False

    def state_dict(self) -> dict[str, int]:
        """Return the place of the iterator begun last: `epoch`, and `samples_done` of it by all ranks together."""
        return asdict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch where the state was taken, at the next `iter`; iterators under way end."""
        done = state.get("batches_done", 0) * self.batch_size * self._num_ranks  # as states once were: on these ranks
        self._place = _Place(max(int(state["epoch"]), 0), int(state.get("samples_done", done)))
        self._has_begun, self._num_loads = False, self._num_loads + 1

    def _seek(self, place: _Place) -> None:
        if self._sampler is not None:
            self._sampler.epoch, self._sampler.skip = place.epoch, place.samples_done
        if self._stream is not None:
            self._stream.skip = place.samples_done


def _sampler_for(dataset: Dataset[Any], batch_size: int, axis: MeshAxis, *, drop_last: bool) -> ShardedSampler:
    num_samples = len(dataset)  # type: ignore[arg-type]
    if num_samples < batch_size * axis.size:
        raise ValueError(
            f"training_data has {num_samples} samples, but one micro-batch on each of {axis.size} ranks takes "
            f"{batch_size} x {axis.size} = {batch_size * axis.size}; give more data or lower "
            "train_micro_batch_size_per_gpu"
        )
    return ShardedSampler(num_samples, axis, drop_last=drop_last)


class RepeatingLoader(Generic[T]):
    """Iterates over a loader for ever, starting it again at its end."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._iterator: Iterator[T] = iter(loader)

    def __iter__(self) -> RepeatingLoader[T]:
        return self

    def __len__(self) -> int:
        return len(self.loader)

    def __next__(self) -> T:
        for _ in range(3):  # what is left of this pass, of an epoch resumed at its end, a whole epoch
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = iter(self.loader)
        raise ValueError("the loader given to RepeatingLoader has no batches; expected at least one")
