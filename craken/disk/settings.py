"""How requests are cut for the disk, how many are in flight, and what direct I/O wants to be aligned to."""

from __future__ import annotations

from dataclasses import dataclass

# what every disk and file system takes: 512 is enough for most, disks with 4 KiB sectors want this
ALIGNMENT_BYTES = 4096


@dataclass(frozen=True)
class IoSettings:
    """How much is in flight: `num_threads` calls at a time, each of `queue_depth` blocks of `block_bytes`.

    The kernel cuts a call into requests of its own and has them all in flight at once, which is what a queue of so many
    blocks is for; other threads fill the gap between one call's end and the next one's begin, which is wide while all
    cores compute. More of either only helps disks that the defaults do not saturate: `craken io` finds out.
    """

    block_bytes: int = 1 << 20
    queue_depth: int = 8
    num_threads: int = 4

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    @property
    def piece_bytes(self) -> int:
        """Return the size of one call, rounded up to the alignment."""
        return round_up(self.block_bytes * self.queue_depth)


def round_up(num_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    return -(-num_bytes // alignment) * alignment


def round_down(num_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    return num_bytes // alignment * alignment
