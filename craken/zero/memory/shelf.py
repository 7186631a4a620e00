"""Makes the flat tensors that rest somewhere between uses: on the device, on the host, in a file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from craken.disk import IoSettings, Swap, SwapFile, Traffic
from craken.zero.memory.courier import Courier
from craken.zero.memory.link import Link
from craken.zero.memory.placement import Place
from craken.zero.memory.room import IdlePages, room_for

Kind = Literal["weights", "states"]


class Resting(NamedTuple):
    """A flat tensor where it rests; in a file it is a view of the file, which takes no memory of its own."""

    flat: Tensor
    file: SwapFile | None = None


class DiskSettings(NamedTuple):
    """The user's folder, how much moves to and from it at a time, how many buffers may be in memory, and the least that
    this host's ranks will set aside there.
    """

    folder: Path
    io: IoSettings
    num_buffers: int
    pins: bool
    wanted_bytes: int = 0


class Shelf:
    """Hands out places for one engine; its files go with it."""

    def __init__(self, link: Link, disks: Mapping[Kind, DiskSettings] | None = None) -> None:
        """Raises OSError when a disk's folder cannot be used or has less room than is wanted."""
        self.link, self.idle_pages = link, IdlePages()
        self._swaps: dict[Kind, Swap] = {}
        self._couriers: dict[Kind, Courier] = {}
        self._by_folder: dict[Path, Swap] = {}
        wanted: Counter[Path] = Counter()
        for disk in (disks or {}).values():
            wanted[disk.folder] += disk.wanted_bytes
        for kind, disk in (disks or {}).items():
            if disk.folder not in self._by_folder:
                self._by_folder[disk.folder] = Swap(disk.folder, disk.io, expected_bytes=wanted[disk.folder])
            self._swaps[kind] = self._by_folder[disk.folder]
            self._couriers[kind] = Courier(disk.num_buffers, pins=disk.pins)

    def empty(
        self, place: Place, numel: int, dtype: torch.dtype, *, kind: Kind, name: str, pins: bool = False
    ) -> Resting:
        """Return undefined values [numel] at `place`, for long; `pins`: in page-locked memory if that is the host's.

        On the host each is a mapping of its own: in the heap they would lie where the model's weights were, with holes
        between them that are too small for activations.
        """
        if place is Place.DISK and numel:
            file = self._swaps[kind].file(name.replace(os.sep, "."), numel * dtype.itemsize)
            return Resting(file.mapped(dtype, numel), file)
        if place is Place.HOST:
            return Resting(self.link.empty(numel, dtype, pins=pins))
        return Resting(room_for(numel, dtype, self.link.device).flat)

    @property
    def num_bytes(self) -> int:
        """Bytes that files have set aside on disks."""
        return sum(swap.num_bytes for swap in self._by_folder.values())

    def courier(self, kind: Kind) -> Courier:
        """Return what carries this kind between files and memory."""
        return self._couriers[kind]

    def traffic(self) -> list[Traffic]:
        """Return what each disk has read and written so far."""
        return [swap.traffic() for swap in self._by_folder.values()]
