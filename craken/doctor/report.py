"""Puts the findings into one table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from craken.doctor.finding import Finding
from craken.doctor.machine import check_devices, check_direct_io, check_nccl, check_precision, check_rendezvous
from craken.doctor.software import check_drop_in, check_libraries, check_programs, check_python

_LOGGED_WIDTH = 120  # of the table when the output is no terminal


def show_report(console: Console | None = None) -> None:
    """Check this machine and print what works and what does not, with the reason; takes seconds."""
    width = None if os.isatty(1) else _LOGGED_WIDTH
    (console or Console(width=width, highlight=False)).print(_table(find_all(Path.cwd())))


def find_all(folder: Path) -> dict[str, Sequence[Finding]]:
    """Run every check; section -> findings."""
    return {
        "software": [*check_python(), check_drop_in()],
        "devices": [*check_devices(), *check_precision()],
        "communication": [check_rendezvous(), check_nccl()],
        "files": [check_direct_io(folder)],
        "other hosts": check_programs(),
        "libraries": check_libraries(),
    }


def _table(sections: dict[str, Sequence[Finding]]) -> Table:
    table = Table(title="What works on this machine", title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("", "", "", ""):
        table.add_column(heading, overflow="fold")
    table.show_header = False
    for section, findings in sections.items():
        for number, finding in enumerate(findings):
            mark = Text("[OK]", "green") if finding.is_ok else Text("[--]", "yellow")
            table.add_row(section if number == 0 else "", finding.name, mark, Text(finding.detail))
        table.add_section()
    return table
