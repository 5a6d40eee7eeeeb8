"""A Ray cluster of two nodes with one core each, on loopback addresses of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]

HOSTS = ("127.0.0.2", "127.0.0.3")
"""Ray puts the machine's own address in the place of 127.0.0.1."""
SECONDS_TO_START = 90
DISABLED = {"RAY_AUTH_MODE": "disabled"}
"""Of its own accord Ray asks for a token where there is one in the user's folder."""


class TwoNodes:
    """Both nodes, from start to stop.

    Args:
        second: whether the second is started now.
        token: that Ray asks for; empty for a cluster that lets everybody in.
    """

    def __init__(self, second: bool = True, token: str = "") -> None:
        self._authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else DISABLED
        # the path of a socket below it may have some hundred letters only
        self._folder = Path(tempfile.mkdtemp(prefix="ray"))
        self.address = f"{HOSTS[0]}:{_free_port()}"
        self._client_port = _free_port()
        self.outside_address = f"ray://{HOSTS[0]}:{self._client_port}"
        self._nodes = [self._start(0)]
        if second:
            self.start_second()

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        place = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self._folder / 'ray'}"]
        place += [f"--ray-client-server-port={self._client_port}"]
        options = place if number == 0 else [f"--address={self.address}"]
        options += [f"--node-ip-address={HOSTS[number]}", "--num-cpus=1", "--object-store-memory=80000000", "--block"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= self._authentication
        log = self._folder / f"{number}.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--include-dashboard=false"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command if number == 0 else command[:-1],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + SECONDS_TO_START
        while b"--block" not in log.read_bytes():  # what it says once it runs
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        return process

    def processes_made(self) -> int:
        """How many processes of workers have ever been started."""
        return len(list((self._folder / "ray").rglob("python-core-worker-*.log")))

    def start_second(self) -> None:
        """Start the second node, unless it runs."""
        if len(self._nodes) == 1:
            self._nodes.append(self._start(1))

    def kill_second(self) -> None:
        """Kill the second node with all that runs on it, as if its machine was switched off."""
        _kill(self._nodes.pop())

    def stop(self) -> None:
        """End both nodes, and remove their files."""
        for process in reversed(self._nodes):
            _kill(process)
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        return int(probe.getsockname()[1])


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for member in reversed(tree):
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()
