"""What a plain loop of copies reaches between host and device, and what copies a profile of a step holds."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAIN_BYTES = 256 << 20
NUM_COPIES = 10


def plain_copies() -> dict[str, float]:
    """Return GB/s of pinned copies of 256 MiB, one after another, `down` (to the host) and `up`."""
    import torch

    from craken.disk import pages

    host = pages(PLAIN_BYTES, pinned=True)
    device = torch.empty(PLAIN_BYTES, dtype=torch.uint8, device="cuda")
    return {name: _gb_per_s(into, out) for name, into, out in (("down", host, device), ("up", device, host))}


def _gb_per_s(into: Any, out: Any) -> float:
    import torch

    seconds = []
    for _ in range(NUM_COPIES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        into.copy_(out, non_blocking=True)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
    return PLAIN_BYTES / statistics.median(seconds) / 1e9


def profiled_copies(step: Callable[[], Any]) -> dict[str, Any]:
    """Run `step` under the profiler and return what its copies moved, by direction."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return copies_in(json.loads(path.read_text())["traceEvents"])


def copies_in(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum the copies between host and device in a trace: bytes, GB/s while copying, and the share that was pinned.

    Copies under 1 MiB (losses, norms, flags) are left out: they measure latency.
    """
    found = {}
    for name, mark in (("down", "Memcpy DtoH"), ("up", "Memcpy HtoD")):
        copies = [
            event
            for event in events
            if event.get("cat") == "gpu_memcpy" and event["name"].startswith(mark) and event["args"]["bytes"] >= 1 << 20
        ]
        moved = sum(event["args"]["bytes"] for event in copies)
        pinned = sum(event["args"]["bytes"] for event in copies if "Pinned" in event["name"])
        busy_us = sum(event["dur"] for event in copies)
        found[name] = {
            "mb": moved / 1e6,
            "gb_per_s": moved / busy_us / 1e3 if busy_us else 0.0,
            "pinned": pinned / moved if moved else 1.0,
        }
    return found
