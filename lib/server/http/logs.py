"""The format of the log: every line with the id of its request; optionally as JSON."""

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
"""The logger of completed requests, with one line each."""
# C0, DEL and C1, the line ends of Unicode, and bidirectional control characters.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# MONAI Label's configuration gives these loggers their own handlers, so the root logger's handlers miss their records.
LOGGERS = ("", "uvicorn", "uvicorn.access")
# The output of job processes, which already has the format of a log.
TASK_LOGGERS = ("task_train", "task_scoring", "task_batch_infer")


def escape_controls(text: str, kept: str = "") -> str:
    """A text with control characters and line ends escaped.

    >>> escape_controls("a\\nb")
    'a\\\\nb'
    """
    return _CONTROLS.sub(lambda match: match[0] if match[0] in kept else repr(match[0])[1:-1], text)


class TextFormatter(logging.Formatter):
    """Lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        """MONAI Label's format with the request's id."""
        record.request_id = request_id_of(record)
        return escape_controls(super().format(record), kept="\n\t")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name is logging's)
        """The message on one line, so that text from clients cannot imitate another log line."""
        record.message = escape_controls(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object for each line; a record that is a JSON object itself (an access) is merged."""

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
    """Set this format on the handlers of MONAI Label's logging configuration."""
    text = "[%(asctime)s] [%(process)s] [%(levelname)s] [%(request_id)s] (%(name)s:%(lineno)d) - %(message)s"
    formatter = JsonFormatter() if log_format == "json" else TextFormatter(text)
    tasks = JsonFormatter() if log_format == "json" else TextFormatter("%(message)s")
    for form, names in ((formatter, LOGGERS), (tasks, TASK_LOGGERS)):
        for name in names:
            for handler in logging.getLogger(name).handlers:
                handler.setFormatter(form)


def request_id_of(record: logging.LogRecord) -> str:
    """The request of a record: the one in which it was created, or the current one."""
    return str(getattr(record, "request_id", None) or current_request_id())


class _ToQueue(QueueHandler):
    """Puts records into a queue, with the request in which they were created."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        record.request_id = current_request_id()
        return record


class _ToRoot(logging.Handler):
    """Passes records to the current handlers of the root logger."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().handle(record)


@contextmanager
def access_lines_aside() -> Iterator[None]:
    """Within the block, a separate thread writes the lines of completed requests; it finishes at the end.

    These lines are logged on the event loop. For each line, MONAI Label's handlers check the size of the log file twice
    and write to two places. Each of these calls releases the interpreter lock, and all other clients would wait until
    the event loop has acquired it again.
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
