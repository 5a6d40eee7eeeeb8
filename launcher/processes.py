"""Starts processes, and ends them together with their child processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS_TO_STOP = 15.0

SECONDS_TO_STOP_CHILDREN = 5.0

WINDOWS = os.name == "nt"


@contextlib.contextmanager
def started(command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process whose output can be read line by line; it ends if this program is interrupted."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def own_process_group() -> dict[str, Any]:
    """Arguments of Popen that put the server and its child processes into one group for signals."""
    if WINDOWS:
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


@contextlib.contextmanager
def stop_requests_set(stopped: threading.Event) -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM set ``stopped`` instead of their usual effect."""
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)]
    if not WINDOWS and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores this signal on purpose
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_tree(server: subprocess.Popen[bytes]) -> int:
    """End the server and all of its child processes (including a training); returns the server's exit code."""
    if WINDOWS:
        return _stop_tree_on_windows(server)
    _signal_group(server.pid, signal.SIGTERM)
    try:
        code = server.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        server.kill()
        code = server.wait()
    deadline = time.monotonic() + SECONDS_TO_STOP_CHILDREN
    while _signal_group(server.pid, 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    _signal_group(server.pid, signal.SIGKILL if not WINDOWS else signal.SIGTERM)
    return code


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; False if it is empty."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _stop_tree_on_windows(server: subprocess.Popen[bytes]) -> int:
    if server.poll() is None:
        server.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
        with contextlib.suppress(subprocess.TimeoutExpired):
            return server.wait(SECONDS_TO_STOP)
    subprocess.run(["taskkill", "/T", "/F", "/PID", str(server.pid)], capture_output=True)
    return server.wait()


def as_exit_code(code: int) -> int:
    """A process's return code in a shell's form: death by signal N is 128 + N."""
    return 128 - code if code < 0 else code
