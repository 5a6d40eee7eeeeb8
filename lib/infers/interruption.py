"""Work that gives way: a check that runs before each window of the network, and may wait or end the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

Check = Callable[[], None]

_check: ContextVar[Check | None] = ContextVar("check", default=None)


class InterruptedWork(Exception):  # noqa: N818 - a decision, not an error
    """Somebody else needs the device; whoever started the work may start it again."""


@contextmanager
def giving_way(check: Check) -> Iterator[None]:
    """Run ``check`` before each window that is computed inside, in this thread or with a copy of its context.

    Args:
        check: returns to go on, waits, or raises (:class:`InterruptedWork`, say) to end the work.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def check_before_each_window(network: nn.Module) -> None:
    """Have a network ask the check of :func:`giving_way`, where there is one."""
    network.register_forward_pre_hook(_ask)


def _ask(module: nn.Module, inputs: Any) -> None:
    check = _check.get()
    if check is not None:
        check()
