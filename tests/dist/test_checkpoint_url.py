"""Ranks that save to a store by URL and resume from it, under another topology too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from craken.checkpoint import verify
from tests.dist.topologies import Topology, start, train


class SharedStore(LocalFileSystem):
    """Files of this host that all ranks reach through fsspec alone."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix("shared://")))


def reach_store() -> None:
    fsspec.register_implementation("shared", SharedStore, clobber=True)


def save_and_go_on(url: str, topology: Topology) -> list[float]:
    reach_store()
    engine = start(topology, "")
    assert engine.load_checkpoint(url) == (None, None)
    for _ in range(2):
        train(engine, 1)
        engine.save_checkpoint(url, client_state={"note": ("a", 1)})
        engine.save_checkpoint(url, tag="pytorch_model", save_latest=False)
    losses = train(engine, 2)
    engine.destroy()
    return losses


def resume(url: str, topology: Topology, tag: str | None) -> tuple[Any, list[float]]:
    reach_store()
    engine = start(topology, "", nudge=1.0)
    loaded = engine.load_checkpoint(url, tag=tag)
    losses = train(engine, 2)
    engine.destroy()
    return loaded, losses


def test_a_run_saves_to_a_url_and_resumes_from_it(run_ranks, tmp_path: Path) -> None:
    reach_store()
    url, topology = f"shared://{tmp_path}/run", Topology(3, 2)
    expected = run_ranks(save_and_go_on, 2, url, topology)[0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "global_step1",
        "global_step2",
        "latest",
        "pytorch_model",
    ]
    assert [verify(f"{url}/{tag}") for tag in ("global_step1", "global_step2", "pytorch_model")] == [[], [], []]
    client = {"note": ("a", 1)}
    assert run_ranks(resume, 2, url, topology, None) == [((f"{url}/global_step2", client), expected)] * 2
    _, losses = run_ranks(resume, 1, url, Topology(1, 1), "pytorch_model")[0]
    assert losses == pytest.approx(expected, rel=1e-6)
