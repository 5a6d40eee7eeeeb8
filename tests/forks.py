"""Processes that start in a second: forks of one that has imported the libraries (``tests/integration/starter.py``)."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.project import SERVER_ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parents[1]
STARTER = REPOSITORY / "tests" / "integration" / "starter.py"
FORKED_PYTHON = STARTER.with_name("forked_python.py")
SECONDS_TO_START = 120
STARTING = threading.Lock()
STARTED: list[subprocess.Popen[bytes]] = []
"""The starter of this process, if it has started one; the end of its input ends it."""


def server_environment() -> dict[str, str]:
    """Variables of every server's process, and of a program's of its own."""
    return {**SERVER_ENVIRONMENT, **os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


class ForkedProcess:
    """A process that the starter has started, used as a :class:`subprocess.Popen` is.

    Args:
        link: to the starter, which has been asked; the process ends with it.
    """

    def __init__(self, link: socket.socket) -> None:
        self.pid, self.returncode = int(link.recv(64)), None
        self._ended = threading.Event()
        threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def _listen(self, link: socket.socket) -> None:
        with link:
            link.settimeout(None)
            # the starter may be gone, and can tell nothing
            self.returncode = int(link.recv(64) or -signal.SIGKILL)
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


def start_starter() -> None:
    """Start the process of ``tests/integration/starter.py`` for this one and its children, with which it ends.

    The children find it by the variable ``TEST_STARTER``.
    """
    place = Path(tempfile.mkdtemp(prefix="starter-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    os.environ.update({"TEST_STARTER": str(place / "socket"), "TEST_PYTHON": sys.executable})
    command = [sys.executable, "-u", "-X", "utf8", str(STARTER), os.environ["TEST_STARTER"]]
    # it would hold up whoever reads this process's output to its end
    silent = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    STARTED.append(subprocess.Popen(command, env=server_environment(), **silent))


def fork(
    module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, code: str = ""
) -> ForkedProcess:
    """``python -m MODULE ARGUMENTS``, or ``python -c CODE``, in a folder, with its output in a file."""
    with STARTING:
        if "TEST_STARTER" not in os.environ:
            start_starter()
    variables = {**environment, **{name: os.environ[name] for name in ("TEST_STARTER", "TEST_PYTHON")}}
    asked = {"module": module, "argv": list(arguments), "cwd": str(folder), "environment": variables, "code": code}
    asked["python"] = "" if code else str(FORKED_PYTHON)
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(SECONDS_TO_START)
    deadline = time.monotonic() + SECONDS_TO_START
    while True:
        try:
            link.connect(os.environ["TEST_STARTER"])
            break
        except (FileNotFoundError, ConnectionRefusedError):  # it does not listen yet
            if time.monotonic() > deadline:
                link.close()
                raise
            time.sleep(0.05)
    with open(os.devnull, "rb") as nothing, log.open("wb") as output:
        streams = [nothing.fileno(), output.fileno(), output.fileno()]
        socket.send_fds(link, [json.dumps(asked).encode()], streams)
    return ForkedProcess(link)


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
        return fork(module, arguments, folder, environment, log)
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
        process: ForkedProcess | subprocess.Popen[bytes] = fork("", [], REPOSITORY, environment, log, code)
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
