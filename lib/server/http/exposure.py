"""Warns if everybody on the network has all permissions."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from lib.server.http.proxies import is_loopback

logger = logging.getLogger("unetr.server")

# Default address of `monailabel start_server` without ``--host``.
STOCK_HOST = "0.0.0.0"


def warn_if_exposed(arguments: Sequence[str], authenticated: bool) -> bool:
    """Print a warning if the server is reachable from other machines and requires no token.

    Args:
        arguments: the process's command line, which is the only source of the address when an ASGI app starts.
        authenticated: whether clients need a token.

    Returns:
        Whether a warning was printed.
    """
    host = listening_host(arguments)
    if authenticated or host is None or is_loopback(host):
        return False
    banner = "!" * 88
    text = (
        f"This server listens on {host} and asks NOBODY for a password: whoever reaches it can read,\n"
        "change and delete the studies. Start it with --host 127.0.0.1, or give it users:\n"
        "    python -m lib.server.http.tokens tokens.yaml NAME ROLE      and      --conf tokens tokens.yaml"
    )
    print(f"\n{banner}\n{text}\n{banner}\n", file=sys.stderr, flush=True)
    logger.warning("listening on %s without authentication", host)
    return True


def listening_host(arguments: Sequence[str]) -> str | None:
    """The address on MONAI Label's command line, or its default; None for another program.

    >>> listening_host(["monailabel", "start_server", "--host", "127.0.0.1"])
    '127.0.0.1'
    """
    if "start_server" not in arguments:
        return None
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--host", "-i"):
            return value if equals else next(iter(arguments[position + 1 :]), STOCK_HOST)
    return STOCK_HOST


def warn_if_closed_to_all(users: int | None) -> bool:
    """Print a warning at the start if the token file names no user, so that nobody has access.

    Args:
        users: number of tokens; None without a token file.

    Returns:
        Whether a warning was printed.
    """
    if users != 0:
        return False
    text = (
        "The token file names NO user, so that nobody may use this server. Add one; it is read while the server runs:"
    )
    command = "    python -m lib.server.http.tokens tokens.yaml NAME ROLE"
    print(f"\n{text}\n{command}\n", file=sys.stderr, flush=True)
    return True
