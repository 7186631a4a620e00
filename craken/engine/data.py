"""The dataloader that `initialize(training_data=...)` returns: each rank its own samples, resumable to the batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from craken.comm import MeshAxis

T = TypeVar("T")


class ShardedSampler(Sampler[int]):
    """Every `axis.size`-th index of a shuffled data set, the same number on every rank.

    The order depends on (seed, epoch) alone. The last indices are filled up from the front, so that ranks stay in step.
    `skip` counts this rank's samples to leave out at the start of the epoch.
    """

    def __init__(self, num_samples: int, axis: MeshAxis, *, shuffle: bool = True, seed: int = 0) -> None:
        self._num_samples, self._axis, self._shuffle, self._seed = num_samples, axis, shuffle, seed
        self.epoch, self.skip = 0, 0

    @property
    def samples_per_rank(self) -> int:
        return -(-self._num_samples // self._axis.size)

    def __len__(self) -> int:
        return self.samples_per_rank - self.skip

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self._num_samples)
        if self._shuffle:
            order = torch.randperm(self._num_samples, generator=torch.Generator().manual_seed(self._seed + self.epoch))
        missing = self.samples_per_rank * self._axis.size - self._num_samples
        order = torch.cat([order, order[:missing]])
        yield from order[self._axis.rank :: self._axis.size][self.skip :].tolist()


class EveryNth(IterableDataset[Any]):
    """Every `axis.size`-th sample of an iterable data set, from this rank's on; what is left of a round is dropped.

    Each rank reads all of it: a data set that shards itself by rank should be given to a dataloader of the user's own.
    """

    def __init__(self, dataset: IterableDataset[Any], axis: MeshAxis) -> None:
        self._dataset, self._axis = dataset, axis

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self._dataset)
        while len(one_each := list(itertools.islice(samples, self._axis.size))) == self._axis.size:
            yield one_each[self._axis.rank]

    def __len__(self) -> int:
        return len(self._dataset) // self._axis.size  # type: ignore[arg-type]


class ResumableLoader(Generic[T]):
    """A DataLoader over this rank's samples that knows where it is; `len` counts this rank's batches an epoch.

    Each `iter` begins the next epoch, or goes on where `load_state_dict` says. The position counts batches handed out.
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
        self._sampler = None
        if not isinstance(dataset, IterableDataset):
            self._sampler = _sampler_for(dataset, batch_size, axis)
        elif axis.size > 1:
            dataset = EveryNth(dataset, axis)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=self._sampler,
            collate_fn=collate_fn,
            drop_last=drop_last,
            # of its own: starting an epoch must not draw from the generator that a resumed run has restored
            generator=torch.Generator(),
        )
        self.epoch, self._batches_done, self._resumes = -1, 0, False

    def __len__(self) -> int:
        if self._sampler is None:
            return len(self._loader)
        num, size = self._sampler.samples_per_rank, self.batch_size
        return num // size if self._loader.drop_last else -(-num // size)

    def __iter__(self) -> Iterator[T]:
        if self._resumes:
            self._resumes = False
        else:
            self.epoch, self._batches_done = self.epoch + 1, 0
        skipped = self._batches_done
        if self._sampler is not None:
            self._sampler.epoch, self._sampler.skip = self.epoch, skipped * self.batch_size
            skipped = 0
        for batch in self._loader:
            if skipped:  # an iterable data set can only be read up to the place
                skipped -= 1
                continue
            self._batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches_done": self._batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batch where the state was taken, at the next `iter`."""
        self.epoch, self._batches_done = int(state["epoch"]), int(state["batches_done"])
        self._resumes = self.epoch >= 0


def _sampler_for(dataset: Dataset[Any], batch_size: int, axis: MeshAxis) -> ShardedSampler:
    num_samples = len(dataset)  # type: ignore[arg-type]
    if num_samples < batch_size * axis.size:
        raise ValueError(
            f"training_data has {num_samples} samples, but one micro-batch on each of {axis.size} ranks takes "
            f"{batch_size} x {axis.size} = {batch_size * axis.size}; give more data or lower "
            "train_micro_batch_size_per_gpu"
        )
    return ShardedSampler(num_samples, axis)


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
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError("the loader given to RepeatingLoader has no batches; expected at least one") from None
