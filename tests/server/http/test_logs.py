from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator

import pytest

from lib.server.http.logs import ACCESS, TASK_LOGGERS, access_lines_aside, set_log_format
from lib.server.http.request_id import begin_request, current_request_id


@pytest.fixture
def handler() -> Iterator[logging.StreamHandler]:
    handler = logging.StreamHandler()
    logging.getLogger("uvicorn").addHandler(handler)
    yield handler
    logging.getLogger("uvicorn").removeHandler(handler)


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("unetr.server", logging.INFO, "file.py", 7, message, (), None)
    made.__dict__.update(extra)
    return made


def test_text_lines_hold_the_request(handler: logging.Handler) -> None:
    begin_request("abcdef-1")
    set_log_format("text")
    assert "[INFO] [abcdef-1] (unetr.server:7) - hello" in handler.format(record("hello"))


def test_what_clients_send_cannot_pass_for_another_line_or_command_a_terminal(handler: logging.Handler) -> None:
    set_log_format("text")
    line = handler.format(record("refused /a\n[2026-01-01] [INFO] all well\x1b[2J\x9b1m\r\u2028\u202eend"))
    assert "\n" not in line and "\x1b" not in line and "\x9b" not in line and "\u2028" not in line
    assert r"refused /a\n[2026-01-01] [INFO] all well\x1b[2J\x9b1m\r\u2028\u202eend" in line


@pytest.mark.parametrize("name", TASK_LOGGERS)
def test_what_the_processes_of_jobs_print_is_escaped_too(name: str) -> None:
    handler = logging.StreamHandler()
    logging.getLogger(name).addHandler(handler)
    try:
        set_log_format("text")
        assert handler.format(record("left out x\x1b]0;evil\x07\nnext")) == r"left out x\x1b]0;evil\x07\nnext"
        set_log_format("json")
        assert json.loads(handler.format(record("loss 0.5")))["message"] == "loss 0.5"
    finally:
        logging.getLogger(name).removeHandler(handler)


def test_json_lines_hold_the_request_and_the_fields(handler: logging.Handler) -> None:
    begin_request("abcdef-2")
    set_log_format("json")
    said = json.loads(handler.format(record("hello\nthere")))
    assert (said["request_id"], said["message"], said["level"]) == ("abcdef-2", "hello\nthere", "INFO")
    assert json.loads(handler.format(record("{}", fields={"status": 200})))["status"] == 200


@pytest.mark.parametrize("proposed", [None, "", "short", "a b c d e f g", "x" * 65, "abc\ndefgh", "ä" * 10])
def test_request_id_that_is_none_is_replaced(proposed: str | None) -> None:
    assert begin_request(proposed) != proposed
    assert len(current_request_id()) == 16


class _Slow(logging.Handler):
    """Writes to a disk that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers, self.said = threading.Event(), list[tuple[str, str]]()

    def emit(self, record: logging.LogRecord) -> None:
        assert self.answers.wait(60)
        self.said.append((record.request_id, record.getMessage()))  # type: ignore[attr-defined]


def test_answers_do_not_wait_until_their_lines_are_written() -> None:
    """They are logged on the event loop, and every other client waited for the log's file."""
    slow, access = _Slow(), logging.getLogger(ACCESS)
    logging.getLogger().addHandler(slow)
    level = access.level
    access.setLevel(logging.INFO)
    try:
        with access_lines_aside():
            for number in range(3):
                begin_request(f"request-{number}")
                access.info("line %d", number)
            assert slow.said == []
            slow.answers.set()
        assert slow.said == [(f"request-{number}", f"line {number}") for number in range(3)]
        assert access.propagate and not access.handlers
    finally:
        access.setLevel(level)
        logging.getLogger().removeHandler(slow)
