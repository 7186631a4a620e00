"""The port where ranks meet."""

from __future__ import annotations

import os
import socket

import pytest

from craken.launch.ports import check_port, find_free_port


def test_a_free_port_passes() -> None:
    check_port(find_free_port())


def test_a_taken_port_is_named_with_its_holder_and_a_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port}.*process {os.getpid()}.*--master_port, \d+ is free"):
            check_port(port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 65535"):
        check_port(port)
