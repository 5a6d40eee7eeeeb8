"""Processes that start in a second: forks of one that has imported the libraries (``tests/integration/starter.py``)."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.project import SERVER_ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[1]
STARTER = REPOSITORY / "tests" / "integration" / "starter.py"
SECONDS_TO_START = 120


def server_environment() -> dict[str, str]:
    """Variables of every server's process, and of a program's of its own."""
    return {**SERVER_ENVIRONMENT, **os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


class ForkedProcess:
    """A process that :class:`Starter` has started, used as a :class:`subprocess.Popen` is."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._ended = threading.Event()

    def end(self, code: int) -> None:
        """Called when it has ended."""
        self.returncode = code
        self._ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Starter:
    """The process of ``tests/integration/starter.py``; it ends with this one."""

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="starter-"))
        atexit.register(shutil.rmtree, self._place, ignore_errors=True)
        socket_file = str(self._place / "socket")
        command = [sys.executable, "-u", "-X", "utf8", str(STARTER), socket_file]
        self._for_forks = {"TEST_STARTER": socket_file, "TEST_PYTHON": sys.executable}
        self._process = subprocess.Popen(
            command, env=server_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._servers: dict[int, ForkedProcess] = {}
        self._started: queue.SimpleQueue[ForkedProcess] = queue.SimpleQueue()
        self._asking = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        log: Path,
        code: str = "",
    ) -> ForkedProcess:
        """``python -m MODULE ARGUMENTS``, or ``python -c CODE``, in a folder, with its output in a file."""
        assert self._process.stdin is not None
        variables = {**environment, **self._for_forks}
        asked = {"argv": list(arguments), "cwd": str(folder), "environment": variables, "log": str(log), "code": code}
        asked |= {"module": module, "python": "" if code else str(STARTER.with_name("forked_python.py"))}
        with self._asking:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return self._started.get(timeout=SECONDS_TO_START)

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            pid, *code = map(int, line.split())
            if code:
                self._servers.pop(pid).end(code[0])
            else:
                self._servers[pid] = ForkedProcess(pid)
                self._started.put(self._servers[pid])


@functools.cache
def the_starter() -> Starter:
    """The one of this test run."""
    return Starter()


def start_module(
    module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path
) -> ForkedProcess | subprocess.Popen[bytes]:
    """``python -m MODULE ARGUMENTS`` as a fork, and so what it starts itself; where there are none, a new process.

    Args:
        module: its name.
        arguments: of its command line.
        folder: in which it runs.
        environment: all variables of its process.
        log: takes its output.
    """
    if sys.platform == "linux":
        return the_starter().start(module, arguments, folder, environment, log)
    return start_python(["-m", module, *arguments], folder, environment, log)


def start_python(
    options: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """``python OPTIONS`` as a user starts it: a process that imports all that it uses."""
    with log.open("wb") as file:
        command = [sys.executable, *options]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)


def run_code(code: str, folder: Path, seconds: float = 300) -> str:
    """What a program prints, run in a process of its own from this repository, which starts with its libraries.

    Args:
        code: in Python.
        folder: for the file of its output.
        seconds: that it may take.

    Raises:
        AssertionError: with its output, when its exit code is not 0.
    """
    log = folder / "output.txt"
    environment = server_environment() | {"PYTHONUNBUFFERED": "1"}
    if sys.platform == "linux":
        process: ForkedProcess | subprocess.Popen[bytes] = the_starter().start(
            "", [], REPOSITORY, environment, log, code
        )
    else:
        process = start_python(["-c", code], REPOSITORY, environment, log)
    try:
        code_of_exit = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    printed = log.read_text(errors="replace")
    assert code_of_exit == 0, printed
    return printed
