"""Checks whether a port is free for a server."""

from __future__ import annotations

import socket

from launcher.errors import RunError
from launcher.processes import WINDOWS


def check_port_is_free(host: str, port: int) -> None:
    """Refuse a port that is in use.

    Raises:
        RunError: naming the port.
    """
    if not port_is_free(host, port):
        raise RunError(
            f"port {port} on {host} is in use or not allowed: stop what listens there, or give another, "
            f"for example --port {port + 1}",
            4,
        )


def port_is_free(host: str, port: int) -> bool:
    """Whether a server can listen on the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            if (
                not WINDOWS
            ):  # on Windows it would allow a second listener; elsewhere it only skips the wait after a stop
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError):
        return False
    return True
