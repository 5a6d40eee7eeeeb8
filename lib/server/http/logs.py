"""The form of the log: every line with the request that it belongs to; as JSON where that is asked for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Literal

from lib.server.http.request_id import current_request_id

LogFormat = Literal["text", "json"]
ACCESS = "unetr.access"
"""The logger of answered requests, one line each."""
# MONAI Label's configuration gives these handlers of their own, and the root logger's do not see what they log.
# C0, DEL and C1, the line ends of Unicode, and what turns the direction of writing.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
LOGGERS = ("", "uvicorn", "uvicorn.access")
# What the processes of jobs print, which has the form of a log already.
TASK_LOGGERS = ("task_train", "task_scoring", "task_batch_infer")


def escape_controls(text: str, kept: str = "") -> str:
    """A text with its control characters and line ends as escapes.

    >>> escape_controls("a\\nb")
    'a\\\\nb'
    """
    return _CONTROLS.sub(lambda match: match[0] if match[0] in kept else repr(match[0])[1:-1], text)


class TextFormatter(logging.Formatter):
    """Lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        """As MONAI Label's, with the request's id."""
        record.request_id = request_id_of(record)
        return escape_controls(super().format(record), kept="\n\t")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name is logging's)
        """The message on one line: what clients send must not look like another line of the log."""
        record.message = escape_controls(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what is logged as a JSON object (an access) stays one."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "request_id": request_id_of(record),
        }
        fields = getattr(record, "fields", None)
        entry |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_log_format(log_format: LogFormat) -> None:
    """Give the handlers that MONAI Label's logging configuration made this form."""
    text = "[%(asctime)s] [%(process)s] [%(levelname)s] [%(request_id)s] (%(name)s:%(lineno)d) - %(message)s"
    formatter = JsonFormatter() if log_format == "json" else TextFormatter(text)
    tasks = JsonFormatter() if log_format == "json" else TextFormatter("%(message)s")
    for form, names in ((formatter, LOGGERS), (tasks, TASK_LOGGERS)):
        for name in names:
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(form)


def request_id_of(record: logging.LogRecord) -> str:
    """The request that a record belongs to: the one in which it was made, or is being written."""
    return str(getattr(record, "request_id", None) or current_request_id())


class _ToQueue(QueueHandler):
    """Hands records on as they are, with the request in which they were made."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.request_id = current_request_id()
        return record


class _ToRoot(logging.Handler):
    """Hands records to the handlers that the root logger has by then."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().handle(record)


@contextmanager
def access_lines_aside() -> Iterator[None]:
    """While this lasts, a thread of its own writes the lines of answered requests; the last of them at the end.

    They are logged on the event loop. The handlers of MONAI Label look twice at the log's file for each line, whether
    it is full, and write it to two places. Each of these calls lets go of the interpreter lock, and then every other
    client waits until the loop has got it back.
    """
    access, lines = logging.getLogger(ACCESS), SimpleQueue[logging.LogRecord]()
    handler, listener = _ToQueue(lines), QueueListener(lines, _ToRoot())
    propagates, access.propagate = access.propagate, False
    access.addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        access.removeHandler(handler)
        access.propagate = propagates
        listener.stop()
