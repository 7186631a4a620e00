"""What the launcher of a job and the agents on its hosts say to each other through an agent's stdin and stderr.

launcher -> agent   one word of `Order` a line on stdin; the end of stdin means that the launcher is gone
agent -> launcher   failures, each as one marked JSON line between the output that just passes through on stderr
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from craken.launch.failure import Failure
from craken.launch.supervise import Order

_MARK = b"\x1ecraken-failure "


class Split(NamedTuple):
    """A stream cut into what to show now, the failures found in it, and the beginning of a record still to come."""

    shown: bytes
    failures: list[Failure]
    rest: bytes


def split_records(data: bytes) -> Split:
    """Cut marked lines out of `data`; everything else passes through byte for byte and at once."""
    shown = b""
    failures: list[Failure] = []
    while _MARK[:1] in data:
        before, _, data = data.partition(_MARK[:1])
        shown += before
        data = _MARK[:1] + data
        if len(data) < len(_MARK) and _MARK.startswith(data):
            return Split(shown, failures, data)
        if not data.startswith(_MARK):
            shown, data = shown + data[:1], data[1:]
            continue
        record, end, after = data[len(_MARK) :].partition(b"\n")
        if not end:
            return Split(shown, failures, data)
        failures.append(Failure.from_json(record.decode()))
        data = after
    return Split(shown + data, failures, b"")


def send_failures(failures: Sequence[Failure]) -> None:
    """Tell the launcher of the job about this host's failures, the first cause first."""
    for failure in failures:
        sys.stderr.buffer.write(_MARK + failure.to_json().encode() + b"\n")
    sys.stderr.buffer.flush()


def obey_stdin(give: Callable[[Order], None]) -> None:
    """Hand orders from stdin to `give`, from a thread, until it ends; its end is an order to terminate."""
    threading.Thread(target=_read_orders, args=(give,), daemon=True).start()


def _read_orders(give: Callable[[Order], None]) -> None:
    pending = b""
    while chunk := os.read(0, 4096):  # not sys.stdin: a thread that blocks in its lock aborts the interpreter at exit
        *words, pending = (pending + chunk).split(b"\n")
        for word in words:
            give(Order[word.decode()])
    give(Order.TERMINATE)
