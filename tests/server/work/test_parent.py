"""A server ends with the process that started it, if that one asks for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from lib.server.work.parent import ENDS_WITH_INPUT, end_with_parent

SERVER = """
import time
from lib.server.work.parent import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_process_stops_when_its_input_ends() -> None:
    environment = {**os.environ, ENDS_WITH_INPUT: "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert server.stdin is not None and server.stdout is not None
    server.stdout.readline()
    assert server.poll() is None
    server.stdin.close()  # as the death of the other end does
    assert server.wait(20) == -signal.SIGTERM
    server.stdout.close()


def test_nothing_is_watched_unless_it_is_asked_for() -> None:
    assert end_with_parent() is None
