"""The unit that is read and checked: a block of a piece, with its checksum."""

from __future__ import annotations

import xxhash

from craken.checkpoint.errors import CheckpointDamaged
from craken.checkpoint.index import FileRecord, TensorRecord
from craken.checkpoint.place import OpenFile, Place, num_bytes_of
from craken.checkpoint.read_plan import BlockRead

BLOCK_BYTES = 8 << 20


def checksum_of(data: memoryview) -> str:
    """Return the checksum of a block: xxh3_64, 16 hex digits."""
    return str(xxhash.xxh3_64_hexdigest(data))


def size_problem(folder: Place, file: FileRecord) -> str | None:
    """Say what is wrong with the presence or the size of a file; None when nothing is."""
    try:
        num_bytes = num_bytes_of(folder / file.name)
    except FileNotFoundError:
        return "is missing"
    if num_bytes != file.num_bytes:
        return f"has {num_bytes} bytes, expected {file.num_bytes}: it was cut short or changed"
    return None


def read_block(path: Place, file: OpenFile, read: BlockRead, into: memoryview, record: TensorRecord) -> None:
    """Read a whole block into `into` and check it; CheckpointDamaged naming the file and the tensor."""
    where = f"{path / read.file}: {record.kind} of {record.fqn}, bytes [{read.start}, {read.start + read.num_bytes})"
    done = 0
    while done < read.num_bytes:
        try:
            got = file.read_into(into[done:], read.start + done)
        except OSError as error:
            raise CheckpointDamaged(f"{where} cannot be read ({error}); load another tag") from error
        if got == 0:
            raise CheckpointDamaged(f"{where}: the file ends after {read.start + done} bytes; load another tag")
        done += got
    found = checksum_of(into)
    if found != read.checksum:
        raise CheckpointDamaged(f"{where} are damaged: checksum {found}, expected {read.checksum}; load another tag")
