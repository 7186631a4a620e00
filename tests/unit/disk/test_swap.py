"""Where files rest: a folder is checked first, a full disk is told before state is lost, and nothing stays behind."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from craken import log
from craken.disk import IoSettings, Swap, folder, pages
from tests.small_disk import mounted

MIB = 1 << 20
KEEP_WRITING = """
import os, sys, torch
from pathlib import Path
from craken.disk import Swap
swap = Swap(Path(sys.argv[1]))
file = swap.file("state", 1 << 20)
file.write(torch.ones(1 << 20, dtype=torch.uint8)).wait()
"""


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("craken-disk")]


def _no_threads_within(seconds: float) -> bool:
    end_s = time.monotonic() + seconds
    while _threads() and time.monotonic() < end_s:
        time.sleep(0.01)
    return not _threads()


def _free_bytes(where: Path) -> int:
    found = os.statvfs(where)
    return found.f_bavail * found.f_frsize


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with mounted(tmp_path / "small", 8 * MIB) as where:
        yield where


def test_a_folder_is_made_and_stays_empty(tmp_path: Path) -> None:
    where = tmp_path / "not" / "there"
    swap = Swap(where)
    file = swap.file("state", 100)
    file.write(torch.ones(25)).wait()
    assert list(where.iterdir()) == []
    assert swap.num_bytes == 4096
    swap.close()
    assert swap.num_bytes == 0


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="it is a file; name a folder on a local disk"):
        Swap(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="name a folder on a local disk"):
        Swap(tmp_path / "file" / "below")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(OSError, match=r"cannot swap to /proc/self: .*; name a folder on a local disk"):
        Swap(Path("/proc/self"))


def test_more_than_is_free_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"bytes free, expected 1,152,921,504,606,846,976: free some space") as error:
        Swap(tmp_path, expected_bytes=1 << 60)
    assert error.value.errno == errno.ENOSPC


def test_refused_direct_io_is_said_once(
    tmp_path: Path, without_direct_io: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_said", set())
    for _ in range(2):
        swap = Swap(tmp_path)
        assert not swap.is_direct
        swap.close()
    assert capsys.readouterr().err.count("refuses direct I/O") == 1


def test_a_file_that_does_not_fit_takes_nothing(small_disk: Path) -> None:
    swap = Swap(small_disk)
    kept = swap.file("kept", 2 * MIB)
    kept.write(torch.ones(2 * MIB, dtype=torch.uint8)).wait()
    free_bytes = _free_bytes(small_disk)
    with pytest.raises(OSError, match=r"swap file 'master'.* bytes free, expected 7,340,032") as error:
        swap.file("master", 7 * MIB)
    assert error.value.errno == errno.ENOSPC
    assert _free_bytes(small_disk) == free_bytes
    into = torch.zeros(2 * MIB, dtype=torch.uint8)
    kept.read(into).wait()
    assert into.sum() == 2 * MIB
    swap.close()


def test_a_disk_that_fills_up_meanwhile_is_told_when_space_is_set_aside(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap, free_bytes = Swap(small_disk), _free_bytes(small_disk)
    monkeypatch.setattr(folder, "check_room", lambda *_: None)  # another process was faster
    with pytest.raises(OSError, match="cannot set 9,437,184 bytes aside for swap file 'master'") as error:
        swap.file("master", 9 * MIB)
    assert error.value.errno == errno.ENOSPC
    error.__traceback__ = None  # type: ignore[attr-defined]
    del error
    gc.collect()
    assert _free_bytes(small_disk) == free_bytes
    swap.close()


def test_space_set_aside_is_there_when_others_fill_the_disk(small_disk: Path) -> None:
    swap = Swap(small_disk)
    file = swap.file("state", 4 * MIB)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "glutton").write_bytes(b"x" * 8 * MIB)
    assert _free_bytes(small_disk) == 0
    file.write(torch.ones(4 * MIB, dtype=torch.uint8)).wait()
    swap.close()


def test_a_deleted_folder_takes_no_state_with_it_and_stops_new_files(tmp_path: Path) -> None:
    where = tmp_path / "disk"
    swap, source = Swap(where), torch.randn(1000)
    file = swap.file("state", source.nbytes)
    file.write(source).wait()
    where.rmdir()
    into = torch.empty_like(source)
    file.read(into).wait()
    assert torch.equal(into, source)
    with pytest.raises(FileNotFoundError, match=r"swap file 'next' in .*disk: No such file"):
        swap.file("next", 100)
    swap.close()


def test_closing_waits_for_writes_ends_threads_and_refuses_more(tmp_path: Path) -> None:
    swap = Swap(tmp_path, IoSettings(num_threads=4))
    file = swap.file("state", 32 * MIB)
    mapped = file.mapped(torch.uint8, 32 * MIB)
    file.write(pages(32 * MIB).fill_(3))
    assert _threads()
    swap.close()
    swap.close()
    assert not _threads()
    assert (mapped == 3).all()
    for call in (lambda: swap.file("more", 10), lambda: file.read(torch.empty(1))):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_forgotten_swap_ends_its_threads_and_gives_its_space_back(tmp_path: Path) -> None:
    swap = Swap(tmp_path)
    file = swap.file("state", MIB)
    file.write(torch.ones(10)).wait()
    descriptors = len(os.listdir("/proc/self/fd"))
    del swap, file
    gc.collect()
    assert _no_threads_within(5.0)
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_a_file_keeps_its_swaps_threads(tmp_path: Path) -> None:
    file = Swap(tmp_path).file("state", 40)
    gc.collect()
    file.write(torch.ones(10)).wait()


def test_a_killed_process_leaves_nothing(small_disk: Path) -> None:
    free_bytes = _free_bytes(small_disk)
    script = KEEP_WRITING + "print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(small_disk)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert _free_bytes(small_disk) <= free_bytes - MIB
        assert list(small_disk.iterdir()) == []
        process.kill()
    assert _free_bytes(small_disk) == free_bytes


def test_a_process_ends_by_itself_and_its_forked_child_takes_nothing_from_it(tmp_path: Path) -> None:
    script = """
if os.fork() == 0:
    sys.exit(0)
os.wait()
into = torch.zeros(1 << 20, dtype=torch.uint8)
file.read(into).wait()
assert into.sum() == 1 << 20
file.write(into)  # still on its way at exit
"""
    command = [sys.executable, "-c", KEEP_WRITING + script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list(tmp_path.iterdir()) == []


def test_there_may_be_more_files_than_a_shell_allows(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip(f"the hard limit on open files is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        swap = Swap(tmp_path)
        files = [swap.file(f"state {number}", 4) for number in range(300)]
        mapped = [file.mapped(torch.float32, 1) for file in files]
        assert len(mapped) == 300
        swap.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["block_bytes", "queue_depth", "num_threads"])
def test_settings_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        IoSettings(**{name: 0})
