"""What each rank of the loopback check runs: meet, exchange rank numbers, compare."""

from __future__ import annotations

from craken.comm import gather_objects, init_distributed, shutdown, world_axis


def main() -> None:
    """Raise when the ranks that answered are not all ranks. Collective over the world."""
    init_distributed("gloo")
    axis = world_axis()
    ranks = gather_objects(axis.rank, axis)
    if ranks != list(range(axis.size)):
        raise RuntimeError(f"expected answers of ranks 0 to {axis.size - 1}, got {ranks}")
    shutdown()


if __name__ == "__main__":
    main()
