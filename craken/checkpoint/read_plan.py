"""Works out which blocks of which files hold a range of a tensor: pure arithmetic on the index."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.index import TensorRecord


class BlockRead(NamedTuple):
    """Read `num_bytes` at `start` of `file`, check them; bytes [skip, skip + take) of them go to byte `into`."""

    file: str
    start: int
    num_bytes: int
    checksum: str
    skip: int
    take: int
    into: int

    @property
    def is_whole(self) -> bool:
        """Whether every byte read is wanted, so that it can be read straight into place."""
        return self.take == self.num_bytes


def plan_reads(record: TensorRecord, offset: int, numel: int, *, itemsize: int, block_bytes: int) -> list[BlockRead]:
    """Return the reads that fill elements [offset, offset + numel), in order; CheckpointDamaged if pieces lack some."""
    reads, end = [], offset
    first_piece = max(bisect_right(record.pieces, offset, key=lambda piece: piece.offset) - 1, 0)
    for piece in record.pieces[first_piece:]:
        if piece.offset >= offset + numel:
            break
        low, high = max(piece.offset, end), min(piece.offset + piece.numel, offset + numel)
        if low >= high:
            continue
        if low > end:
            break
        first, last = (low - piece.offset) * itemsize, (high - piece.offset) * itemsize  # bytes within the piece
        for block in range(first // block_bytes, -(-last // block_bytes)):
            begin, stop = block * block_bytes, min((block + 1) * block_bytes, piece.end - piece.start)
            wanted, until = max(first, begin), min(last, stop)
            into = (piece.offset - offset) * itemsize + wanted
            start, checksum = piece.start + begin, piece.blocks[block]
            reads.append(BlockRead(piece.file, start, stop - begin, checksum, wanted - begin, until - wanted, into))
        end = high
    if end != offset + numel:
        raise CheckpointDamaged(f"no file holds elements [{end}, {offset + numel}) of {record.kind} of {record.fqn}")
    return reads
