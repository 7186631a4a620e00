"""Moves flat host tensors to and from files, past the page cache, while the program goes on."""

from craken.disk.file import SwapFile
from craken.disk.folder import takes_direct_io
from craken.disk.memory import pages
from craken.disk.mover import Ticket
from craken.disk.settings import IoSettings, round_up
from craken.disk.swap import Swap
from craken.disk.traffic import Traffic
from craken.disk.transfer import read_direct, write_all

__all__ = [
    "IoSettings",
    "Swap",
    "SwapFile",
    "Ticket",
    "Traffic",
    "pages",
    "read_direct",
    "round_up",
    "takes_direct_io",
    "write_all",
]
