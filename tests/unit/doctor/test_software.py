"""Checks of what is installed."""

from __future__ import annotations

import importlib.metadata

import pytest

from craken.doctor import software


def _install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "is_ok", "words"),
    [
        ({}, False, "not installed"),
        ({"deepspeed": "0.19.6"}, False, "the original 0.19.6 is installed in its place; `pip uninstall deepspeed`"),
        ({"deepspeed": "0.19.6+craken1"}, True, "0.19.6+craken1"),
    ],
)
def test_the_report_tells_whose_deepspeed_it_is(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], is_ok: bool, words: str
) -> None:
    _install(monkeypatch, versions)
    finding = software.check_drop_in()
    assert finding.is_ok is is_ok
    assert words in finding.detail


def test_a_missing_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, {"peft": "9.9"})
    found = {finding.name: finding for finding in software.check_libraries()}
    assert found["peft"] == ("peft", True, "9.9")
    assert "pip install trl" in found["trl"].detail


def test_a_missing_program_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = {finding.name: finding for finding in software.check_programs()}
    assert not any(finding.is_ok for finding in found.values())
    assert "--launcher pdsh" in found["pdsh"].detail
