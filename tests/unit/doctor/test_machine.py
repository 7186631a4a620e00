"""Checks of the machine that can be tried on any."""

from __future__ import annotations

from pathlib import Path

import pytest

from craken.doctor.machine import check_devices, check_direct_io, check_nccl, check_precision, cpu_flags


def test_a_cpus_flags_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu amx_bf16\nprocessor : 1\nflags\t\t: fpu avx2\n")
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "amx_bf16"}
    assert cpu_flags(tmp_path / "none") == set()


def test_emulated_precision_says_what_that_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("craken.doctor.machine.cpu_flags", lambda path: {"avx512_bf16"})
    bf16, fp16 = check_precision()
    assert (bf16.is_ok, fp16.is_ok) == (True, False)
    assert "avx512_bf16" in bf16.detail
    assert "emulated" in fp16.detail


def test_direct_io_is_refused_where_files_cannot_be_made() -> None:
    finding = check_direct_io(Path("/proc"))
    assert not finding.is_ok
    assert "nvme_path" in finding.detail


def test_direct_io_leaves_no_file(tmp_path: Path) -> None:
    check_direct_io(tmp_path)
    assert not list(tmp_path.iterdir())


def test_refused_direct_io_says_what_happens_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("craken.doctor.machine.takes_direct_io", lambda folder: False)
    finding = check_direct_io(tmp_path)
    assert not finding.is_ok
    assert "through the page cache" in finding.detail


def test_devices_and_nccl_always_have_a_reason() -> None:
    assert all(finding.detail for finding in [*check_devices(), check_nccl()])
