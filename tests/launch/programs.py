"""Small programs that ranks run in the launcher's tests, and the way to start the launcher on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SHOW = """
import json, os, sys
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
         "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "FROM_FILE"]
seen = {name: os.environ[name] for name in names if name in os.environ}
seen |= {"argv": sys.argv[1:], "tty": [sys.stdin.isatty(), sys.stdout.isatty(), sys.stderr.isatty()],
         "cores": sorted(os.sched_getaffinity(0)), "name": __name__, "path0": sys.path[0]}
print(json.dumps(seen))
"""

FAIL = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("last words", file=sys.stderr)
    how = sys.argv[-1]
    if how == "raise": raise ValueError("boom")
    if how == "exit": os._exit(7)
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""

# Rank 0 loses its peer long before rank 1, which still tidies up, says why it ended.
VICTIM_FIRST = """
import os, time
if os.environ["RANK"] == "0":
    raise RuntimeError("pair.cc:553] Connection closed by peer [127.0.0.1]:1")
time.sleep(0.5)
raise ValueError("the cause")
"""

SAVE = """
import os, signal, sys, time
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append("SIGINT"))
signal.signal(signal.SIGTERM, lambda *_: stop.append("SIGTERM"))
print("ready", flush=True)
while not stop:
    time.sleep(0.01)
time.sleep(float(sys.argv[-1]))
print("rank", os.environ["RANK"], "saved after", *stop, flush=True)
"""

STUBBORN = """
import os, signal, time
if os.environ["RANK"] == "1":
    time.sleep(0.3)
    raise ValueError("boom")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""

SUM = """
import os, sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print("rank", dist.get_rank(), "sum", int(total), flush=True)
how = sys.argv[-1]
if how == "raise" and dist.get_rank() == 1:
    raise ValueError("boom")
if how == "wait":
    time.sleep(60)
dist.barrier()
dist.destroy_process_group()
"""

# Two ranks sum until one is lost; one alone is content.
ELASTIC_SUM = """
import time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print("rank", dist.get_rank(), "sum", int(total), flush=True)
while dist.get_world_size() > 1:
    time.sleep(0.1)
    dist.barrier()
dist.destroy_process_group()
"""

STUCK = """
import os, threading, time
if os.environ["RANK"] == "1":
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise ValueError("boom")
time.sleep(60)
"""


def write(folder: Path, text: str) -> str:
    """Write a program into `folder`, return its path."""
    path = folder / "program.py"
    path.write_text(text)
    return str(path)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "craken.cli", "launch", *words]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment for launchers: craken importable from any folder, nothing of a surrounding job."""
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    return {**kept, "PYTHONPATH": str(ROOT), **(extra or {})}


def run(words: Sequence[str], folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher in `folder` to its end; stdout and stderr apart."""
    return subprocess.run(
        command(*words), cwd=folder, env=environment(extra), capture_output=True, text=True, timeout=60
    )


def start(words: Sequence[str], folder: Path, **extra: str) -> subprocess.Popen[str]:
    """Start the launcher in `folder`; stdout and stderr together."""
    return subprocess.Popen(
        command(*words),
        cwd=folder,
        env=environment(extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process: subprocess.Popen[str], words: str, times: int, timeout_s: float = 20) -> str:
    """Read lines until `words` was seen so many times; the lines read."""
    assert process.stdout is not None
    seen, text, deadline_s = 0, "", time.monotonic() + timeout_s
    while seen < times:
        line = process.stdout.readline()
        assert line, f"the launcher ended early:\n{text}"
        assert time.monotonic() < deadline_s, text
        seen, text = seen + (words in line), text + line
    return text


def processes_of(path: str) -> list[int]:
    """Return the processes that have `path` on their command line, this one aside."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
                is_dead = "State:\tZ" in (entry / "status").read_text()
            except OSError:
                continue
            if path.encode() in line and not is_dead:
                found.append(int(entry.name))
    return found
