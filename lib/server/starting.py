"""Reports a failed start: one sentence for the user, and the stack trace in the log file."""

from __future__ import annotations

import logging
import sys

from lib.errors import UnetrError

logger = logging.getLogger("unetr.server")


def tell_failure(error: BaseException) -> None:
    """Print on standard error why the server does not start.

    Args:
        error: the error; the stack trace of an unexpected one goes to the log files only.
    """
    while len(getattr(error, "exceptions", ())) == 1:  # a group around one error
        error = error.exceptions[0]  # type: ignore[attr-defined]
    kept = not isinstance(error, UnetrError) and _keep_trace(error)
    details = "; the log has the details" if kept else ""
    print(f"\nThe server does not start: {sentence_of(error)}{details}\n", file=sys.stderr, flush=True)


def sentence_of(error: BaseException) -> str:
    """The message of an error on one line.

    >>> sentence_of(FileNotFoundError(2, "No such file or directory", "/certificates/key.pem"))
    "no such file or directory: '/certificates/key.pem'"
    >>> sentence_of(KeyError("x"))
    "KeyError: 'x'"
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror[:1].lower()}{error.strerror[1:]}: {error.filename!r}"
    text = " ".join(str(error).split())
    if isinstance(error, UnetrError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _keep_trace(error: BaseException) -> bool:
    """Write the stack trace to the log files; False if there are none."""
    files = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]
    trace = (type(error), error, error.__traceback__)
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "the server does not start", (), trace)
    for handler in files:
        handler.handle(record)
    return bool(files)
