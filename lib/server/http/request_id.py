"""The id of the current request, available everywhere in the code."""

from __future__ import annotations

import contextvars
import re
import secrets

HEADER = "x-request-id"
_VALID = re.compile(r"[A-Za-z0-9-]{8,64}")
_CURRENT: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


def current_request_id() -> str:
    """The current request's id; ``-`` outside of one."""
    return _CURRENT.get()


def begin_request(proposed: str | None) -> str:
    """Use the id that a client or proxy proposes, if it is valid, or create a new one."""
    chosen = proposed if proposed and _VALID.fullmatch(proposed) else secrets.token_hex(8)
    _CURRENT.set(chosen)
    return chosen
