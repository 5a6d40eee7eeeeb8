"""Logs of the real servers of a test, shown in pytest's report when it fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path

LINES = 40
"""Of the end of a log that are shown."""
TRACEBACK = "Traceback (most recent call last):"


@dataclasses.dataclass
class _Log:
    """A server's log: whether the server may still write to it, and its size when the current test began."""

    is_open: bool = True
    size_before: int = 0


class ServerLogs:
    """The logs to which the servers of the current test write or have written."""

    def __init__(self) -> None:
        self._logs: dict[Path, _Log] = {}

    def opened(self, log: Path) -> None:
        """A server starts to write to a log; what the file held before is gone."""
        self._logs[log] = _Log()

    def closed(self, log: Path) -> None:
        """A server has ended; its log is shown until the next test begins."""
        if log in self._logs:
            self._logs[log].is_open = False

    def begin_test(self) -> None:
        """Forget the servers that have ended, and what the others have written up to now."""
        self._logs = {log: state for log, state in self._logs.items() if state.is_open and log.is_file()}
        for log, state in self._logs.items():
            state.size_before = log.stat().st_size

    def sections(self) -> list[tuple[str, str]]:
        """Title and text of each log for pytest's report."""
        found = []
        for log, state in self._logs.items():
            if log.is_file():
                with log.open("rb") as file:
                    file.seek(state.size_before)
                    written = file.read().decode(errors="replace")
                found.append((f"Captured log of the server in {log.parent}", summarize(written)))
        return found


def summarize(written: str, lines: int = LINES) -> str:
    """The end of a log; its last traceback stands before it, unless it is in it.

    Args:
        written: since the test began.
        lines: of the end that are shown.
    """
    # a log in JSON holds a traceback in one line
    rows = [part for row in written.splitlines() for part in (row.split("\\n") if TRACEBACK in row else [row])]
    starts = [number for number, row in enumerate(rows) if TRACEBACK in row]
    if not rows:
        return "(it has written nothing in this test)"
    end_from = max(0, len(rows) - lines)
    if not starts or starts[-1] >= end_from:
        return "\n".join(rows[end_from:])
    last = starts[-1]
    stop = last + 1
    while stop < len(rows) and rows[stop].startswith((" ", "\t")):
        stop += 1
    # the line before it says what failed, the line after its frames is the exception
    trace = rows[max(0, last - 1) : stop + 1]
    rest = rows[max(end_from, stop + 1) :]
    between = [] if len(rest) == len(rows) - stop - 1 else ["[...]"]
    return "\n".join([*trace, *between, *rest])


LOGS = ServerLogs()
"""Those of this process."""
