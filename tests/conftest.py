"""What every test may ask for: ranks to run a function on."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.pool import Pool, new_pool

# ranks run one thread each; plain PyTorch beside them must add up in the same order
torch.set_num_threads(1)
settings.register_profile("craken", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("craken")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the machine's GPUs unless `tests/gpu` or `-m gpu` is asked for: other tests are about CPUs and gloo."""
    is_asked = re.search(r"(?<!not )\bgpu\b", config.option.markexpr) or any("tests/gpu" in arg for arg in config.args)
    if not is_asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Pool]:
    """Worker processes for the whole session; started by the first test that needs them."""
    pool = new_pool()
    yield pool
    pool.stop()
    shutil.rmtree(pool.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def run_ranks(rank_pool: Pool) -> Callable[..., list[Any]]:
    """Return `run(function, world_size, *args, timeout_s=60, joins_world=True, **kwargs) -> results by rank`."""

    def run(
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 60.0,
        joins_world: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        return rank_pool.run(function, world_size, args, kwargs, timeout_s=timeout_s, joins_world=joins_world)

    return run
