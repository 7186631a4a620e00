"""Looks whether the rendezvous port is free, before a rank is started, and finds one that is."""

from __future__ import annotations

import socket

import psutil


def find_free_port() -> int:
    """Return a TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise ValueError when `port` is no port number or something listens on it on this host."""
    if not 0 < port < 65536:
        raise ValueError(f"--master_port: expected a number from 1 to 65535, got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger are no listeners
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"port {port}, where ranks are to meet, cannot be opened here ({error.strerror}{_holder(port)}); "
                f"choose another with --master_port, {find_free_port()} is free now"
            ) from error


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
                return f" by process {connection.pid}, {psutil.Process(connection.pid).name()}"
    except psutil.Error:  # other users' processes are not ours to see
        return ""
    return ""
