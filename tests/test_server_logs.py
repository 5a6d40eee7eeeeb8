"""A failing test of a real server shows what the server has logged."""

from __future__ import annotations

from pathlib import Path

from tests.forks import REPOSITORY, run_code
from tests.server_logs import ServerLogs, summarize

TRACE = [
    "ERROR - GET /info/ failed",
    "Traceback (most recent call last):",
    '  File "a.py", line 1, in answer',
    "    raise KeyError(name)",
    "KeyError: 'spleen'",
]
FAILING_TEST = """
from pathlib import Path
from tests.integration.server import Server

def test_fails(tmp_path):
    # this process is a fork, and so is what it starts as a user does
    server = Server(tmp_path, {"preset": "no_such_preset_anywhere"}, forked=False)
    server.launch().wait(100)
    assert server.answers()
"""


def test_end_of_a_log_is_shown_with_the_traceback_in_it() -> None:
    assert summarize("\n".join(["before"] * 100 + TRACE + ["after"] * 3), 10).splitlines() == [
        *["before"] * 2,
        *TRACE,
        *["after"] * 3,
    ]


def test_traceback_from_before_the_end_of_a_log_is_shown_too() -> None:
    shown = summarize("\n".join([*TRACE, "early", *["after"] * 30]), 10).splitlines()
    assert shown == [*TRACE, "[...]", *["after"] * 10]
    reaching_in = summarize("\n".join([*TRACE, *["after"] * 6]), 9).splitlines()
    assert reaching_in == [*TRACE, *["after"] * 6]


def test_last_of_several_tracebacks_is_shown() -> None:
    other = [row.replace("spleen", "liver") for row in TRACE]
    shown = summarize("\n".join([*TRACE, *["between"] * 20, *other, *["after"] * 20]), 5)
    assert "liver" in shown and "spleen" not in shown


def test_traceback_in_a_line_of_json_is_shown_line_by_line() -> None:
    line = '{"level": "ERROR", "exception": "' + "\\n".join(TRACE[1:]) + '"}'
    assert TRACE[2] in summarize(line).splitlines()


def test_log_without_a_traceback_ends_with_its_last_lines() -> None:
    assert summarize("one\ntwo\nthree", 2) == "two\nthree"
    assert summarize("") == "(it has written nothing in this test)"


def test_log_of_a_shared_server_begins_with_the_test(tmp_path: Path) -> None:
    logs, shared, ended = ServerLogs(), tmp_path / "shared" / "server.log", tmp_path / "ended" / "server.log"
    for log in (shared, ended):
        log.parent.mkdir()
        log.write_text("of an earlier test\n")
        logs.opened(log)
    logs.closed(ended)
    assert [text for _, text in logs.sections()] == ["of an earlier test"] * 2
    logs.begin_test()
    with shared.open("a") as file:
        file.write("of this test\n")
    assert logs.sections() == [(f"Captured log of the server in {shared.parent}", "of this test")]
    shared.write_text("again\n")
    logs.opened(shared)
    assert [text for _, text in logs.sections()] == ["again"], "a server that is started again begins a new log"


def test_report_of_a_failing_test_holds_the_log_of_its_server(tmp_path: Path) -> None:
    file = tmp_path / "test_failing.py"
    file.write_text(FAILING_TEST)
    # another distribution installs a package of the name tests.integration
    code = f"import pytest, tests; tests.__path__ = [{str(REPOSITORY / 'tests')!r}]; "
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-n", "0", "-q", "--rootdir", str(tmp_path), str(file)]
    options += ["--basetemp", str(tmp_path / "files")]
    printed = run_code(f"{code} assert pytest.main({options!r}) == 1", tmp_path)
    _, _, shown = printed.partition("Captured log of the server in ")
    assert "no_such_preset_anywhere" in shown, printed
