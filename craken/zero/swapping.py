"""Masters and optimizer states that rest in files, and are in memory for their group's update alone.

    disk   | read 1 | read 2 | write 1 | read 3 | write 2 | ...
    host            | update 1         | update 2         | update 3

At rest every tensor is a view of its file: whoever reads or writes it then (checkpoints, `safe_get_full_fp32_param`)
goes through the page cache and is right. For an update they are views of a buffer that direct I/O has filled. States
that the optimizer makes, at its first step, move into files behind that step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from craken.disk import SwapFile, Ticket, round_up
from craken.zero.binding import Binding
from craken.zero.group import MasterFragment, ShardGroup
from craken.zero.memory.courier import Courier
from craken.zero.memory.heap import returning_freed_memory
from craken.zero.memory.placement import Place
from craken.zero.memory.shelf import Resting
from craken.zero.state import empty_state, tensor_states

_MASTER = "master"


@dataclass(frozen=True)
class SwapSettings:
    """Whether reads and writes run beside updates."""

    reads_ahead: bool = True
    writes_behind: bool = True


class StateSwap:
    """Brings the states of groups that rest on a disk to hand, in the order of an update."""

    def __init__(
        self, groups: Sequence[ShardGroup], binding: Binding, courier: Courier, settings: SwapSettings
    ) -> None:
        self._courier, self._settings = courier, settings
        self._swapped = {
            index: _Swapped(group, binding, binding.fragments(index))
            for index, group in enumerate(groups)
            if group.master_file is not None
        }
        self._coming: dict[int, tuple[Tensor, list[Ticket]]] = {}
        self._order = list(self._swapped)

    @contextlib.contextmanager
    def at_hand(self, index: int) -> Iterator[None]:
        """Have a group's master and states in memory inside the block; what it writes goes back to their files."""
        if index not in self._swapped:
            yield
            return
        swapped = self._swapped[index]
        self._start_reading(index)
        self._read_ahead(index)
        buffer, tickets = self._coming.pop(index)
        flats = swapped.flats_in(buffer)
        try:
            for ticket in tickets:
                ticket.wait()
            swapped.bring(flats)
            with returning_freed_memory():  # states made here are freed when they have moved to files
                yield
            written = swapped.write(flats)
        except BaseException:
            swapped.show(swapped.at_rest)
            self._courier.give_back(buffer)
            self._forget_coming()
            raise
        self._courier.give_back_after(buffer, written)
        if not self._settings.writes_behind:
            self._courier.wait()

    def empty_state(self, fragment: MasterFragment, key: str) -> Tensor:
        """Return undefined values for a state of a fragment, in its file if that is where it rests."""
        for swapped in self._swapped.values():
            if (place := swapped.place_of(fragment, key)) is not None:
                return place
        return empty_state(fragment, key)

    def wait(self) -> None:
        """Return when all is back in the files."""
        self._courier.wait()

    def reserve(self, keys: Mapping[str, torch.dtype]) -> None:
        """Make the files of states that the optimizer will have; OSError if there is no room for them."""
        for swapped in self._swapped.values():
            swapped.reserve(keys)

    def _forget_coming(self) -> None:
        for buffer, tickets in self._coming.values():
            for ticket in tickets:
                with contextlib.suppress(OSError):
                    ticket.wait()
            self._courier.give_back(buffer)
        self._coming = {}

    def _read_ahead(self, index: int) -> None:
        if not self._settings.reads_ahead:
            return
        for following in self._order[self._order.index(index) + 1 :]:
            if following in self._coming:
                continue
            if not self._courier.can_take():
                return
            self._start_reading(following)

    def _start_reading(self, index: int) -> None:
        if index not in self._coming:
            buffer = self._courier.take(max(swapped.num_bytes for swapped in self._swapped.values()))
            self._coming[index] = (buffer, self._swapped[index].read_into(buffer))


class _Swapped:
    """The master and the states of one group: flat tensors, each in a file, that fragments are views of."""

    def __init__(self, group: ShardGroup, binding: Binding, fragments: Sequence[MasterFragment]) -> None:
        self.group, self._binding, self._fragments = group, binding, list(fragments)
        start = group.master.storage_offset()
        self._offsets = [int(f.tensor.storage_offset() - start) if f.spec.numel else 0 for f in fragments]
        self._resting = {_MASTER: Resting(group.master, group.master_file)}

    @property
    def at_rest(self) -> Mapping[str, Tensor]:
        return {key: resting.flat for key, resting in self._resting.items()}

    @property
    def num_bytes(self) -> int:
        return sum(round_up(resting.flat.nbytes) for resting in self._resting.values())

    def flats_in(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the places in `buffer` (uint8) of what rests in files, each on whole pages."""
        flats, at = {}, 0
        for key, resting in self._resting.items():
            flats[key] = buffer.narrow(0, at, resting.flat.nbytes).view(resting.flat.dtype)
            at += round_up(resting.flat.nbytes)
        return flats

    def read_into(self, buffer: Tensor) -> list[Ticket]:
        return [self._file(key).read(flat) for key, flat in self.flats_in(buffer).items()]

    def place_of(self, fragment: MasterFragment, key: str) -> Tensor | None:
        """Return a state's place in its file, which is made if need be; None for another group's fragment."""
        for mine, offset in zip(self._fragments, self._offsets, strict=True):
            if mine.tensor is fragment.tensor:
                self.reserve({key: fragment.tensor.dtype})
                return _part(self._resting[key].flat, fragment, offset)
        return None

    def reserve(self, keys: Mapping[str, torch.dtype]) -> None:
        """Make the files that are not there yet."""
        shelf, group = self.group.wire.shelf, self.group
        for key in keys.keys() - self._resting.keys():
            name = f"{group.label}.{key}"
            self._resting[key] = shelf.empty(Place.DISK, group.master.numel(), keys[key], kind="states", name=name)

    def bring(self, flats: Mapping[str, Tensor]) -> None:
        """Make everything a view of `flats`, which hold what was in the files; states replaced since go there too."""
        self._collect(flats, known=self.at_rest)
        self.show(flats)

    def write(self, flats: Mapping[str, Tensor]) -> list[Ticket]:
        """Start to write what an update left in `flats`; the tensors are views of the files again."""
        self._collect(flats, known=flats)
        self.reserve({key: state.dtype for key, state, _, _ in self._states()})
        new = {key: flat for key, flat in self.at_rest.items() if key not in flats}
        self._collect(new, known=new)
        self.show(self.at_rest)
        return [self._file(key).write(flat) for key, flat in flats.items()]

    def show(self, flats: Mapping[str, Tensor]) -> None:
        """Make the master and the states views of `flats`."""
        self.group.master = flats[_MASTER]
        for fragment, offset in zip(self._fragments, self._offsets, strict=True):
            fragment.tensor.data = _part(flats[_MASTER], fragment, offset)
        for key, state, fragment, offset in self._states():
            if key in flats:
                state.data = _part(flats[key], fragment, offset)

    def _collect(self, flats: Mapping[str, Tensor], *, known: Mapping[str, Tensor]) -> None:
        """Copy states that are no views of `known`, as they came into being elsewhere, to their places in `flats`."""
        for key, state, fragment, offset in self._states():
            if key in flats and state.data_ptr() != _part(known[key], fragment, offset).data_ptr():
                _part(flats[key], fragment, offset).copy_(state)

    def _states(self) -> Iterator[tuple[str, Tensor, MasterFragment, int]]:
        """Yield the key and the tensor of each state, whose it is, and where that lies in flat tensors."""
        for fragment, offset in zip(self._fragments, self._offsets, strict=True):
            for key, state in tensor_states(self._binding, fragment):
                yield key, state, fragment, offset

    def _file(self, key: str) -> SwapFile:
        file = self._resting[key].file
        assert file is not None, f"{self.group.label}: {key} does not rest in a file"
        return file


def _part(flat: Tensor, fragment: MasterFragment, offset: int) -> Tensor:
    return flat.narrow(0, offset, fragment.spec.numel).view(fragment.tensor.shape)
