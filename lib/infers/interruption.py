"""Interruptible work: a check that runs before each window of the network, and may block or abort the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

Check = Callable[[], None]

_check: ContextVar[Check | None] = ContextVar("check", default=None)


class InterruptedWork(Exception):  # noqa: N818 - a decision, not an error
    """Other work needs the device; the caller may start the interrupted work again."""


@contextmanager
def interruptible_by(check: Check) -> Iterator[None]:
    """Run ``check`` before each window that is computed inside the block, in this thread or a copy of its context.

    Args:
        check: returns to continue, blocks, or raises (for example :class:`InterruptedWork`) to abort the work.
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def check_before_each_window(network: nn.Module) -> None:
    """Make a network call the check of :func:`interruptible_by`, if one is set."""
    network.register_forward_pre_hook(_run_check)


def _run_check(module: nn.Module, inputs: Any) -> None:
    check = _check.get()
    if check is not None:
        check()
